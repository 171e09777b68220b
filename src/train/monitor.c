// SPDX-License-Identifier: MIT
// train/monitor.c: drift measured while training, on a small set of rows: divergence, margins, slot probabilities, projection shift
// (science notes 2.2, 3.1: M1, M4, M5). Owns the rows, the base's part and the capture of projections.
#include "platform.h"
#include "run.h"

#include <jansson.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const keel_monitor_name[KEEL_N_MONITORED] = { "kl_mean", "margin_drop", "flip_rate", "p_contrary", "p_incoherent",
                                                       "projection_shift" };

// What a sequence is. Of the two sequences of a probe the first is the good one.
enum kind { COMPLETION, CHOSEN, REJECTED, ALIGNED, CONTRARY };

#define LINE(row) (row)->file, (unsigned long long)(row)->line

// --- rows ----------------------------------------------------------------------------------------

static keel_status add(struct keel_train_run *r, struct keel_train_row row, enum kind kind)
{
    keel_status st = KEEL_OK;
    struct keel_train_monitor *m = &r->monitor;
    KEEL_TRY(keel_train_set_add(&m->set, row, r->log));
    if (m->set.n_rows > m->cap_kind) {
        m->cap_kind = 2 * m->set.n_rows;
        uint8_t *kinds = realloc(m->kind, m->cap_kind);
        if (!kinds) {
            KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "out of memory for the rows of --monitor");
        }
        m->kind = kinds;
    }
    m->kind[m->set.n_rows - 1] = (uint8_t)kind;
out:
    return st;
}

// Prompt, prefix and an answer, each tokenised by itself.
static keel_status add_answer(struct keel_train_run *r, const struct keel_row *row, const char *field, enum kind kind)
{
    keel_status st = KEEL_OK;
    struct keel_prompt p = { 0 };
    struct keel_train_row out = { 0 };
    const char *prefix = NULL, *answer;
    size_t prefix_len = 0, len;
    KEEL_TRY(keel_row_str(row, field, &answer, &len));
    KEEL_TRY(keel_row_opt_str(row, "prefix", &prefix, &prefix_len));
    KEEL_TRY(keel_row_prompt(&p, r->model, r->p->images, row, true));
    if (prefix) {
        KEEL_TRY(keel_prompt_complete(r->model, &p, prefix, prefix_len));
    }
    out.first = p.n;
    KEEL_TRY(keel_prompt_complete(r->model, &p, answer, len));
    keel_train_row_adopt(&out, &p);
    out.n_loss = out.n - out.first;
    if (out.first == 0 || out.n_loss == 0 || out.n > r->p->seq_len) {
        KEEL_ERROR(r->log, "%s:%llu: %s", LINE(row), out.n > r->p->seq_len ? "more tokens than --seq-len; raise it or shorten the row"
                                                    : out.n_loss == 0     ? "an answer is empty; nothing can be measured"
                                                                          : "the prompt is empty and the model has no BOS token");
        keel_train_row_finish(&out);
        st = KEEL_ERR_DATA;
        goto out;
    }
    KEEL_TRY(add(r, out, kind));
out:
    keel_prompt_finish(&p);
    return st;
}

static keel_status add_row(struct keel_train_run *r, const struct keel_row *row)
{
    static const char *const pair[2][2] = { { "chosen", "rejected" }, { "aligned", "contrary" } };
    static const enum kind kind[2][2] = { { CHOSEN, REJECTED }, { ALIGNED, CONTRARY } };
    keel_status st = KEEL_OK;
    struct keel_train_row made;
    for (int k = 0; k < 2; k++) {
        if (json_object_get(row->object, pair[k][0]) || json_object_get(row->object, pair[k][1])) {
            KEEL_TRY(add_answer(r, row, pair[k][0], kind[k][0]));
            return add_answer(r, row, pair[k][1], kind[k][1]);
        }
    }
    KEEL_TRY(keel_train_row_make(&made, r->model, r->p->images, row, r->p->seq_len));
    KEEL_TRY(add(r, made, COMPLETION));
out:
    return st;
}

static keel_status read_rows(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    struct keel_row row = { 0 };
    KEEL_TRY(keel_map_open(&map, r->p->monitor, r->log));
    struct keel_jsonl reader = keel_jsonl_make(map.data, map.len_bytes, r->p->monitor, r->log);
    for (;;) {
        KEEL_TRY(keel_jsonl_next(&reader, &row));
        if (!row.object) {
            break;
        }
        KEEL_TRY(add_row(r, &row));
        json_decref(row.object);
        row.object = NULL;
    }
    if (r->monitor.set.n_rows == 0) {
        KEEL_FAIL(r->log, KEEL_ERR_DATA, "%s: no rows; one JSON object a line is expected", r->p->monitor);
    }
out:
    json_decref(row.object);
    keel_map_close(&map);
    return st;
}

static bool has_kind(const struct keel_train_monitor *m, enum kind kind)
{
    return m->set.n_rows > 0 && memchr(m->kind, (int)kind, m->set.n_rows) != NULL;
}

// Whether the rows of this run let a metric be measured; if not, what they lack.
static bool measurable(const struct keel_train_run *r, enum keel_monitor_metric metric, const char **lack)
{
    const struct keel_train_monitor *m = &r->monitor;
    switch (metric) {
    case KEEL_MONITOR_MARGIN_DROP:
    case KEEL_MONITOR_FLIP_RATE: *lack = "rows with \"chosen\" and \"rejected\""; return has_kind(m, CHOSEN);
    case KEEL_MONITOR_P_CONTRARY:
    case KEEL_MONITOR_P_INCOHERENT: *lack = "rows with \"aligned\" and \"contrary\""; return has_kind(m, ALIGNED);
    case KEEL_MONITOR_PROJECTION_SHIFT: *lack = "--monitor-direction"; return r->p->monitor_direction.v != NULL;
    default: *lack = ""; return true;
    }
}

keel_status keel_train_monitor_load(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const struct keel_train_params *p = r->p;
    struct keel_train_monitor *m = &r->monitor;
    if (!p->monitor) {
        return KEEL_OK;
    }
    KEEL_TRY(read_rows(r));
    for (size_t i = 0; i < p->n_guard; i++) {
        const char *lack;
        if (!measurable(r, p->guard[i].metric, &lack)) {
            KEEL_FAIL(r->log, KEEL_ERR_ARG, "--guard %s: %s does not measure it: it needs %s", keel_monitor_name[p->guard[i].metric],
                      p->monitor, lack);
        }
    }
    m->top = calloc(m->set.n_loss, sizeof *m->top);
    m->base = calloc(m->set.n_loss, sizeof *m->base);
    m->now = calloc(m->set.n_loss, sizeof *m->now);
    m->kl = calloc(m->set.n_loss, sizeof *m->kl);
    if (!m->top || !m->base || !m->now || !m->kl) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "%s: no memory for what the base predicts at %llu tokens", p->monitor,
                  (unsigned long long)m->set.n_loss);
    }
out:
    return st;
}

bool keel_train_monitor_due(const struct keel_train_run *r, uint64_t step)
{
    return r->monitor.set.n_rows > 0 && (step % r->p->monitor_every == 0 || step == r->n_steps);
}

// --- projections ---------------------------------------------------------------------------------

static void record_projection(void *user, const struct keel_capture_call *call)
{
    const struct keel_train_monitor *m = user;
    const uint64_t bytes = 4ull * call->n_rows;
    keel_rows_dot(call->rec, call->x, m->u, keel_span_sub(m->dot, 0, bytes), call->n_rows, 1, call->width);
    keel_rows_square(call->rec, call->x, keel_span_sub(m->square, 0, bytes), call->n_rows, call->width);
}

static keel_status take_projection(void *user, const struct keel_batch_tokens *tokens)
{
    keel_status st = KEEL_OK;
    struct keel_train_run *r = user;
    struct keel_train_monitor *m = &r->monitor;
    const uint64_t bytes = 4ull * tokens->n;
    KEEL_TRY(keel_download(r->dev, m->dot_host, keel_span_sub(m->dot, 0, bytes), bytes));
    KEEL_TRY(keel_download(r->dev, m->square_host, keel_span_sub(m->square, 0, bytes), bytes));
    for (uint32_t t = 0; t < tokens->n; t++) {
        if (tokens->marks[t] > 0) {
            m->sum_dot += (double)m->dot_host[t];
            m->sum_norm += sqrt((double)m->square_host[t]);
            m->n_tokens++;
        }
    }
out:
    return st;
}

static keel_status make_capture(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_monitor *m = &r->monitor;
    const struct keel_monitor_direction *d = &r->p->monitor_direction;
    const uint32_t width = keel_model_info(r->model)->width;
    const struct keel_positions at = { .kind = KEEL_AT_LAST_PROMPT };
    double sum = 0;
    float *unit = malloc(width * sizeof *unit);
    m->max_tokens = r->p->batch * keel_train_longest(r);
    m->dot_host = malloc(m->max_tokens * sizeof *m->dot_host);
    m->square_host = malloc(m->max_tokens * sizeof *m->square_host);
    if (!unit || !m->dot_host || !m->square_host) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "out of memory for projections");
    }
    for (uint32_t i = 0; i < width; i++) {
        sum += (double)d->v[i] * (double)d->v[i];
    }
    if (!isfinite(sum) || sum <= 0) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--monitor-direction: its length is %g; a direction is needed", sqrt(sum));
    }
    for (uint32_t i = 0; i < width; i++) {
        unit[i] = (float)((double)d->v[i] / sqrt(sum));
    }
    KEEL_TRY(keel_heap_alloc(r->heap, 4ull * width, &m->u));
    KEEL_TRY(keel_heap_alloc(r->heap, 4ull * m->max_tokens, &m->dot));
    KEEL_TRY(keel_heap_alloc(r->heap, 4ull * m->max_tokens, &m->square));
    KEEL_TRY(keel_upload(r->dev, m->u, unit, 4ull * width));
    KEEL_TRY(keel_hooks_create(&m->hooks, r->model));
    KEEL_TRY(keel_hooks_add_capture(m->hooks, d->site, d->layer, at, record_projection, m));
    KEEL_TRY(keel_hooks_after_batch(m->hooks, at, take_projection, r));
out:
    free(unit);
    return st;
}

// --- measuring -----------------------------------------------------------------------------------

static keel_status measure_base(struct keel_train_run *r, const struct keel_train_row *rows, struct keel_seq *seqs, uint32_t n)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_trainer_top(r->trainer, seqs, n, r->monitor.top + rows->place0));
    KEEL_TRY(keel_trainer_eval(r->trainer, NULL, seqs, n, r->monitor.base + rows->place0, NULL));
out:
    return st;
}

static keel_status measure_adapted(struct keel_train_run *r, const struct keel_train_row *rows, struct keel_seq *seqs, uint32_t n)
{
    keel_status st = KEEL_OK;
    const struct keel_train_monitor *m = &r->monitor;
    for (uint32_t i = 0; i < n; i++) {
        seqs[i].top = m->top + rows[i].place0;
    }
    if (r->tower) {
        KEEL_TRY(keel_image_trainer_forward(r->tower, r->adapter, seqs, n));
    }
    KEEL_TRY(keel_trainer_eval(r->trainer, r->adapter, seqs, n, m->now + rows->place0, m->kl + rows->place0));
out:
    return st;
}

static keel_status measure_all(struct keel_train_run *r, keel_train_batch_fn *measure)
{
    keel_status st = KEEL_OK;
    struct keel_train_monitor *m = &r->monitor;
    m->sum_dot = m->sum_norm = m->n_tokens = 0;
    KEEL_TRY(keel_trainer_set_hooks(r->trainer, m->hooks));
    st = keel_train_each_batch(r, &m->set, measure);
    const keel_status back = keel_trainer_set_hooks(r->trainer, r->p->hooks);
    st = st == KEEL_OK ? back : st;
out:
    return st;
}

keel_status keel_train_monitor_prepare(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_monitor *m = &r->monitor;
    if (m->set.n_rows == 0) {
        return KEEL_OK;
    }
    if (r->p->monitor_direction.v) {
        KEEL_TRY(make_capture(r));
    }
    KEEL_TRY(measure_all(r, measure_base));
    if (m->hooks && m->n_tokens > 0) {
        m->base_dot = m->sum_dot / m->n_tokens;
        m->base_norm = m->sum_norm / m->n_tokens;
    }
out:
    return st;
}

static double sum_of(const struct keel_train_row *row, const float *values)
{
    double sum = 0;
    for (uint32_t i = 0; i < row->n_loss; i++) {
        sum += (double)values[row->place0 + i];
    }
    return sum;
}

static double margin_of(const struct keel_train_row *row, const float *values)
{
    return sum_of(&row[0], values) / row[0].n_loss - sum_of(&row[1], values) / row[1].n_loss;
}

keel_status keel_train_monitor_measure(struct keel_train_run *r)
{
    struct keel_train_monitor *m = &r->monitor;
    const uint64_t begin = keel_now_ns();
    double kl = 0, n_kl = 0, drop = 0, flips = 0, n_margins = 0, contrary = 0, incoherent = 0, n_slots = 0;
    const keel_status st = measure_all(r, measure_adapted);
    for (uint64_t i = 0; st == KEEL_OK && i < m->set.n_rows; i++) {
        const struct keel_train_row *row = &m->set.rows[i];
        if (m->kind[i] == CHOSEN) {
            const double now = margin_of(row, m->now);
            drop += margin_of(row, m->base) - now;
            flips += now < 0;
            n_margins++;
        } else if (m->kind[i] == ALIGNED) {
            const double a = exp(sum_of(&row[0], m->now)), b = exp(sum_of(&row[1], m->now));
            contrary += b;
            incoherent += fmax(0, 1 - a - b);
            n_slots++;
        }
        if (m->kind[i] != REJECTED && m->kind[i] != CONTRARY) {
            kl += sum_of(row, m->kl);
            n_kl += row->n_loss;
        }
    }
    // Without rows of its kind a metric is 0 / 0: not measured.
    m->value[KEEL_MONITOR_KL_MEAN] = kl / n_kl;
    m->value[KEEL_MONITOR_MARGIN_DROP] = drop / n_margins;
    m->value[KEEL_MONITOR_FLIP_RATE] = flips / n_margins;
    m->value[KEEL_MONITOR_P_CONTRARY] = contrary / n_slots;
    m->value[KEEL_MONITOR_P_INCOHERENT] = incoherent / n_slots;
    m->value[KEEL_MONITOR_PROJECTION_SHIFT] = m->hooks ? (m->sum_dot / m->n_tokens - m->base_dot) / m->base_norm : NAN;
    m->seconds = (double)(keel_now_ns() - begin) * 1e-9;
    return st;
}

void keel_train_monitor_finish(struct keel_train_monitor *m)
{
    keel_hooks_destroy(&m->hooks);
    keel_train_set_finish(&m->set);
    free(m->kind);
    free(m->top);
    free(m->base);
    free(m->now);
    free(m->kl);
    free(m->dot_host);
    free(m->square_host);
    *m = (struct keel_train_monitor){ 0 };
}
