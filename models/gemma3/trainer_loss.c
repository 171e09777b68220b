// SPDX-License-Identifier: MIT
// gemma3/trainer_loss.c: what a training pass computes at its loss places: negative log-likelihood, plain or with the token weights
// of constrained fine-tuning (Qi et al. 2024, arXiv 2406.05946), and divergence from the base, of which the likeliest tokens are kept.
// Logits exist a chunk of places at a time.
#include "trainer_internal.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

// --- values by place -----------------------------------------------------------------------------

// Of an array with `size` bytes a place, in host memory.
static void *at_place(const keel_trainer *t, struct keel_span s, uint32_t p, uint32_t size)
{
    uint8_t *chunk = keel_span_host(keel_place_span(&t->batch, s, p / t->chunk * t->chunk, 1, size));
    return chunk + (size_t)(p % t->chunk) * size;
}

static void want_places(struct keel_layout *l, const keel_trainer *t, struct keel_span *s, uint32_t size)
{
    keel_want(l, s, (uint64_t)keel_div_up(t->max_loss, t->chunk) * keel_align_up((uint64_t)t->chunk * size, 256));
}

static void want_constrain(struct keel_layout *l, void *user)
{
    keel_trainer *t = user;
    want_places(l, t, &t->constrain.beta, 4);
    want_places(l, t, &t->constrain.base, 4);
}

static void want_top(struct keel_layout *l, void *user)
{
    keel_trainer *t = user;
    want_places(l, t, &t->top.ids, 4 * KEEL_TOP);
    want_places(l, t, &t->top.log_p, 4 * KEEL_TOP);
    want_places(l, t, &t->top.tail, 4);
    want_places(l, t, &t->top.stats, 16);
    keel_want(l, &t->top.values, 4ull * t->chunk * KEEL_TOP);
}

uint64_t keel_trainer_extra_bytes(const keel_model *model, uint32_t max_loss, bool divergence)
{
    keel_trainer t = { .model = (keel_model *)(uintptr_t)model, .max_loss = max_loss };
    struct keel_layout l = { 0 };
    t.chunk = keel_logit_rows(&model->cfg, KEEL_MIN(64u, max_loss), UINT64_C(128) << 20);
    (divergence ? want_top : want_constrain)(&l, &t);
    return l.bytes;
}

static keel_status make_top_room(keel_trainer *t)
{
    return t->top.heap ? KEEL_OK : keel_layout_make(&t->top.heap, t->model->dev, KEEL_HEAP_HOST, "base's likeliest tokens", want_top, t);
}

static uint32_t n_top(const keel_trainer *t)
{
    return KEEL_MIN(KEEL_TOP, t->model->cfg.vocab);
}

// --- what the caller knows of the places ---------------------------------------------------------

static uint32_t n_places(const struct keel_seq *s)
{
    uint32_t n = 0;
    for (uint32_t i = s->first; i < s->n; i++) {
        n += !s->mask || s->mask[i];
    }
    return n;
}

static keel_status fill_constrain(keel_trainer *t, const struct keel_seq *seqs, size_t n_seqs)
{
    keel_status st = KEEL_OK;
    uint32_t p = 0;
    if (!t->constrain.heap) {
        KEEL_TRY(keel_layout_make(&t->constrain.heap, t->model->dev, KEEL_HEAP_HOST, "constrained loss", want_constrain, t));
    }
    for (size_t s = 0; s < n_seqs; s++) {
        const uint32_t n = n_places(&seqs[s]);
        KEEL_ASSERT(seqs[s].beta && seqs[s].base_logprob);
        for (uint32_t i = 0; i < n; i++, p++) {
            *(float *)at_place(t, t->constrain.beta, p, 4) = seqs[s].beta[i];
            *(float *)at_place(t, t->constrain.base, p, 4) = seqs[s].base_logprob[i];
        }
    }
    keel_span_flush(t->model->dev, t->constrain.beta);
    keel_span_flush(t->model->dev, t->constrain.base);
out:
    return st;
}

static keel_status fill_top(keel_trainer *t, const struct keel_seq *seqs, size_t n_seqs)
{
    keel_status st = KEEL_OK;
    uint32_t p = 0;
    KEEL_TRY(make_top_room(t));
    for (size_t s = 0; s < n_seqs; s++) {
        const uint32_t n = n_places(&seqs[s]);
        KEEL_ASSERT(seqs[s].top);
        for (uint32_t i = 0; i < n; i++, p++) {
            const struct keel_top *top = &seqs[s].top[i];
            memcpy(at_place(t, t->top.ids, p, 4 * KEEL_TOP), top->id, sizeof top->id);
            memcpy(at_place(t, t->top.log_p, p, 4 * KEEL_TOP), top->log_p, sizeof top->log_p);
            *(float *)at_place(t, t->top.tail, p, 4) = top->tail;
        }
    }
    keel_span_flush(t->model->dev, t->top.ids);
    keel_span_flush(t->model->dev, t->top.log_p);
    keel_span_flush(t->model->dev, t->top.tail);
out:
    return st;
}

// --- recording -----------------------------------------------------------------------------------

// A chunk of places: [first, first + n).
struct chunk {
    uint32_t first, n;
    struct keel_span rows; // [n, D] normed on entry; where there is a way back, their gradient on return
};

static void record_nll(keel_trainer *t, const struct chunk *c)
{
    keel_xent(t->rec, &(struct keel_xent_params){ .logits = t->logits, .stats = keel_place_span(&t->batch, t->batch.stats, c->first, c->n, 16),
                                                  .targets = keel_place_span(&t->batch, t->batch.target, c->first, c->n, 4),
                                                  .partial = t->partial, .n_rows = c->n, .vocab = t->model->cfg.vocab });
}

static struct keel_top_params top_params(const keel_trainer *t, const struct chunk *c)
{
    return (struct keel_top_params){
        .logits = t->logits, .ids = keel_place_span(&t->batch, t->top.ids, c->first, c->n, 4 * KEEL_TOP),
        .log_p = keel_place_span(&t->batch, t->top.log_p, c->first, c->n, 4 * KEEL_TOP),
        .tail_log_p = keel_place_span(&t->batch, t->top.tail, c->first, c->n, 4),
        .weights = keel_place_span(&t->batch, t->batch.weight, c->first, c->n, 4),
        .top = keel_span_sub(t->top.values, 0, 4ull * c->n * KEEL_TOP),
        .stats = keel_place_span(&t->batch, t->top.stats, c->first, c->n, 16), .partial = t->partial, .n_rows = c->n,
        .vocab = t->model->cfg.vocab, .n_top = n_top(t)
    };
}

static void record_kl(keel_trainer *t, const struct chunk *c)
{
    const struct keel_top_params top = top_params(t, c);
    keel_top_take(t->rec, &top);
    keel_top_kl(t->rec, &top);
}

static void head_back(keel_trainer *t, const struct chunk *c)
{
    keel_linear_bwd(t->rec, &(struct keel_linear_bwd_params){ .w = t->model->w.head, .dy = t->logits, .dx = c->rows, .n_tokens = c->n });
}

static void nll_and_back(keel_trainer *t, const struct chunk *c)
{
    record_nll(t, c);
    keel_xent_bwd(t->rec, &(struct keel_xent_bwd_params){ .logits = t->logits, .n_rows = c->n, .vocab = t->model->cfg.vocab,
                                                          .targets = keel_place_span(&t->batch, t->batch.target, c->first, c->n, 4),
                                                          .stats = keel_place_span(&t->batch, t->batch.stats, c->first, c->n, 16),
                                                          .weights = keel_place_span(&t->batch, t->batch.weight, c->first, c->n, 4) });
    head_back(t, c);
}

static void constrained_and_back(keel_trainer *t, const struct chunk *c)
{
    const struct keel_span weights = keel_place_span(&t->batch, t->batch.weight, c->first, c->n, 4);
    const struct keel_span stats = keel_place_span(&t->batch, t->batch.stats, c->first, c->n, 16);
    record_nll(t, c);
    keel_xent_constrain(t->rec, stats, keel_place_span(&t->batch, t->constrain.beta, c->first, c->n, 4),
                        keel_place_span(&t->batch, t->constrain.base, c->first, c->n, 4), weights, c->n);
    keel_xent_bwd(t->rec, &(struct keel_xent_bwd_params){ .logits = t->logits, .stats = stats, .weights = weights, .n_rows = c->n,
                                                          .targets = keel_place_span(&t->batch, t->batch.target, c->first, c->n, 4),
                                                          .vocab = t->model->cfg.vocab });
    head_back(t, c);
}

static void kl_and_back(keel_trainer *t, const struct chunk *c)
{
    const struct keel_top_params top = top_params(t, c);
    record_kl(t, c);
    keel_top_bwd(t->rec, &top);
    head_back(t, c);
}

static void nll_and_kl(keel_trainer *t, const struct chunk *c)
{
    record_nll(t, c);
    record_kl(t, c);
}

// Normed final residual at the places.
static void record_rows(keel_trainer *t)
{
    const struct keel_gemma3 *c = &t->model->cfg;
    keel_gather_rows(t->rec, t->acts.x, t->batch.place, t->rows, t->batch.n_places, c->width);
    keel_rmsnorm(t->rec, &(struct keel_rmsnorm_params){ .x = t->rows, .w = t->model->w.output_norm, .y = t->normed,
                                                        .n_rows = t->batch.n_places, .width = c->width, .eps = c->eps });
}

// Logits of each chunk in turn, and what `at` does with them.
static void record_places(keel_trainer *t, const struct keel_pass *pass, void (*at)(keel_trainer *t, const struct chunk *c))
{
    const uint32_t width = t->model->cfg.width;
    record_rows(t);
    for (uint32_t p = 0; p < t->batch.n_places; p += t->chunk) {
        struct chunk c = { .first = p, .n = KEEL_MIN(t->chunk, t->batch.n_places - p) };
        c.rows = keel_span_sub(t->normed, 4ull * p * width, 4ull * c.n * width);
        keel_pass_head(pass, c.rows, t->logits, c.n);
        at(t, &c);
    }
}

// From the gradient of the normed rows to that of the final residual stream, g.x.
static void rows_back(keel_trainer *t)
{
    const struct keel_gemma3 *c = &t->model->cfg;
    const uint32_t n = t->batch.n_places;
    keel_rmsnorm_bwd(t->rec, &(struct keel_rmsnorm_bwd_params){ .x = t->rows, .w = t->model->w.output_norm, .dy = t->normed,
                                                                .dx = t->normed, .n_rows = n, .width = c->width, .eps = c->eps });
    keel_record_fill(t->rec, keel_span_sub(t->g.x, 0, 4ull * t->batch.n_tokens * c->width), 0);
    keel_scatter_rows(t->rec, t->normed, t->batch.place, t->g.x, n, c->width);
}

// --- steps ---------------------------------------------------------------------------------------

static keel_status submit(keel_trainer *t)
{
    const keel_status st = keel_recorder_submit(t->rec);
    return st == KEEL_OK ? keel_recorder_wait(t->rec) : st;
}

// `hooked`: under the trainer's hooks.
static keel_status step(keel_trainer *t, const keel_adapter *adapter, struct keel_span grads, const struct keel_seq *seqs, size_t n_seqs,
                        bool hooked, void (*at)(keel_trainer *t, const struct chunk *c))
{
    keel_status st = KEEL_OK;
    struct keel_pass pass;
    KEEL_TRY(keel_trainer_forward(t, adapter, seqs, n_seqs, hooked, &pass));
    if (t->batch.n_places > 0) {
        record_places(t, &pass, at);
        rows_back(t);
        keel_trainer_backward(t, &pass, grads);
        KEEL_TRY(submit(t));
    }
out:
    if (st != KEEL_OK && t->rec) {
        keel_recorder_reset(t->rec);
    }
    return st;
}

keel_status keel_trainer_step(keel_trainer *t, const keel_adapter *adapter, struct keel_span grads, const struct keel_seq *seqs,
                              size_t n_seqs, double *nll_sum, uint64_t *n_loss)
{
    keel_status st = KEEL_OK;
    const bool constrained = n_seqs > 0 && seqs[0].beta;
    *nll_sum = t->weighted = 0;
    *n_loss = 0;
    if (constrained) {
        KEEL_TRY(fill_constrain(t, seqs, n_seqs));
    }
    KEEL_TRY(step(t, adapter, grads, seqs, n_seqs, true, constrained ? constrained_and_back : nll_and_back));
    keel_span_fetch(t->model->dev, t->batch.stats);
    keel_span_fetch(t->model->dev, t->batch.weight);
    for (uint32_t p = 0; p < t->batch.n_places; p++) {
        const float *v = at_place(t, t->batch.stats, p, 16);
        const double nll = (double)v[1] - (double)v[2];
        *nll_sum += nll;
        t->weighted += nll * (double)*(const float *)at_place(t, t->batch.weight, p, 4);
    }
    *n_loss = t->batch.n_places;
out:
    return st;
}

double keel_trainer_weighted(const keel_trainer *t)
{
    return t->weighted;
}

keel_status keel_trainer_kl_step(keel_trainer *t, const keel_adapter *adapter, struct keel_span grads, const struct keel_seq *seqs,
                                 size_t n_seqs, double *kl_sum, uint64_t *n)
{
    keel_status st = KEEL_OK;
    *kl_sum = 0;
    *n = 0;
    KEEL_TRY(fill_top(t, seqs, n_seqs));
    KEEL_TRY(step(t, adapter, grads, seqs, n_seqs, false, kl_and_back));
    keel_span_fetch(t->model->dev, t->top.stats);
    for (uint32_t p = 0; p < t->batch.n_places; p++) {
        *kl_sum += (double)((const float *)at_place(t, t->top.stats, p, 16))[2];
    }
    *n = t->batch.n_places;
out:
    return st;
}

keel_status keel_trainer_eval(keel_trainer *t, const keel_adapter *adapter, const struct keel_seq *seqs, size_t n_seqs, float *logprob,
                              float *kl)
{
    keel_status st = KEEL_OK;
    struct keel_pass pass;
    if (kl) {
        KEEL_TRY(fill_top(t, seqs, n_seqs));
    }
    KEEL_TRY(keel_trainer_forward(t, adapter, seqs, n_seqs, true, &pass));
    if (t->batch.n_places == 0) {
        return KEEL_OK;
    }
    record_places(t, &pass, kl ? nll_and_kl : record_nll);
    KEEL_TRY(submit(t));
    keel_span_fetch(t->model->dev, t->batch.stats);
    if (kl) {
        keel_span_fetch(t->model->dev, t->top.stats);
    }
    for (uint32_t p = 0; p < t->batch.n_places; p++) {
        const float *v = at_place(t, t->batch.stats, p, 16);
        logprob[p] = v[2] - v[1];
        if (kl) {
            kl[p] = ((const float *)at_place(t, t->top.stats, p, 16))[2];
        }
    }
    KEEL_TRY(keel_pass_after(&pass));
out:
    if (st != KEEL_OK) {
        keel_recorder_reset(t->rec);
    }
    return st;
}

// --- the base's likeliest tokens -----------------------------------------------------------------

// The n largest of x [vocab], largest first, of equals the one with the lower number. False: NaN among them.
static bool choose(const float *x, uint32_t vocab, uint32_t n, uint32_t *id, float *value)
{
    uint32_t have = 0;
    for (uint32_t v = 0; v < vocab; v++) {
        if (have == n && !(x[v] > value[n - 1])) {
            continue;
        }
        uint32_t k = have < n ? have++ : n - 1;
        for (; k > 0 && x[v] > value[k - 1]; k--) {
            value[k] = value[k - 1];
            id[k] = id[k - 1];
        }
        value[k] = x[v];
        id[k] = v;
    }
    for (uint32_t k = 0; k < n; k++) {
        if (!isfinite(value[k])) {
            return false;
        }
    }
    return true;
}

// Logits to log-probabilities, given the log-sum-exp of the rest.
static void normalise(struct keel_top *top, uint32_t n, float tail)
{
    const double best = fmax((double)top->log_p[0], (double)tail);
    double sum = exp((double)tail - best);
    for (uint32_t k = 0; k < n; k++) {
        sum += exp((double)top->log_p[k] - best);
    }
    const double lse = best + log(sum);
    for (uint32_t k = 0; k < n; k++) {
        top->log_p[k] = (float)((double)top->log_p[k] - lse);
    }
    top->tail = (float)fmax((double)tail - lse, -(double)FLT_MAX);
}

// The list of each place of a chunk whose logits were recorded; `host` [chunk, V] is scratch.
static keel_status top_of_chunk(keel_trainer *t, const struct chunk *c, float *host, struct keel_top *out)
{
    keel_status st = KEEL_OK;
    const uint32_t vocab = t->model->cfg.vocab, n = n_top(t);
    const struct keel_top_params params = top_params(t, c);
    KEEL_TRY(submit(t));
    KEEL_TRY(keel_download(t->model->dev, host, t->logits, 4ull * c->n * vocab));
    for (uint32_t i = 0; i < c->n; i++) {
        if (!choose(host + (size_t)i * vocab, vocab, n, out[i].id, out[i].log_p)) {
            KEEL_FAIL(t->model->log, KEEL_ERR_NUMERIC, "the base model's logits are not finite; run `keel doctor` and report the driver");
        }
        memcpy(at_place(t, t->top.ids, c->first + i, 4 * KEEL_TOP), out[i].id, sizeof out[i].id);
    }
    keel_span_flush(t->model->dev, t->top.ids);
    keel_top_take(t->rec, &params);
    KEEL_TRY(submit(t));
    keel_span_fetch(t->model->dev, t->top.stats);
    for (uint32_t i = 0; i < c->n; i++) {
        normalise(&out[i], n, ((const float *)at_place(t, t->top.stats, c->first + i, 16))[1]);
    }
out:
    return st;
}

keel_status keel_trainer_top(keel_trainer *t, const struct keel_seq *seqs, size_t n_seqs, struct keel_top *out)
{
    keel_status st = KEEL_OK;
    const struct keel_gemma3 *g = &t->model->cfg;
    struct keel_pass pass;
    float *host = malloc(4ull * t->chunk * g->vocab);
    if (!host) {
        KEEL_FAIL(t->model->log, KEEL_ERR_NO_MEMORY, "no memory for %u rows of logits", t->chunk);
    }
    KEEL_TRY(make_top_room(t));
    KEEL_TRY(keel_trainer_forward(t, NULL, seqs, n_seqs, false, &pass));
    if (t->batch.n_places > 0) {
        record_rows(t);
    }
    for (uint32_t p = 0; p < t->batch.n_places; p += t->chunk) {
        const struct chunk c = { .first = p, .n = KEEL_MIN(t->chunk, t->batch.n_places - p) };
        keel_pass_head(&pass, keel_span_sub(t->normed, 4ull * p * g->width, 4ull * c.n * g->width), t->logits, c.n);
        KEEL_TRY(top_of_chunk(t, &c, host, out + p));
    }
out:
    free(host);
    if (st != KEEL_OK) {
        keel_recorder_reset(t->rec);
    }
    return st;
}
