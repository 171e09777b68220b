// SPDX-License-Identifier: MIT
// gemma3/session.c: a sequence that grows: prompt in chunks, then one recorded step replayed token by token; adapters; sampling.
// Evaluation over packed rows is in score.c.
#include "session_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MIN_BUCKET 64u // tokens of context that the first recorded step is good for

// --- life ----------------------------------------------------------------------------------------

static void want_host(struct keel_layout *l, void *user)
{
    keel_session *s = user;
    keel_batch_layout(l, &s->batch, &s->model->cfg, s->n_batch, s->n_batch, s->chunk);
}

static void want_device(struct keel_layout *l, void *user)
{
    keel_session *s = user;
    keel_acts_layout(l, &s->acts, &s->model->cfg, s->n_batch, s->n_ctx, false, keel_device_caps(s->model->dev)->max_range);
    keel_scorer_layout(l, &s->scorer, &s->model->cfg, s->n_batch, s->chunk, 1);
}

keel_status keel_session_create(keel_session **out, keel_model *model, const struct keel_session_params *params)
{
    keel_status st = KEEL_OK;
    keel_session *s = calloc(1, sizeof *s);
    const struct keel_gemma3 *c = &model->cfg;
    *out = NULL;
    if (!s) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "no memory for a session");
    }
    if (!model->dev) {
        KEEL_FAIL(model->log, KEEL_ERR_ARG, "the model is not loaded onto a device yet");
    }
    s->model = model;
    s->n_ctx = params && params->n_ctx ? params->n_ctx : KEEL_MIN(4096u, c->context);
    s->n_batch = KEEL_MIN(params && params->n_batch ? params->n_batch : 256, s->n_ctx);
    if (s->n_ctx > c->context) {
        KEEL_FAIL(model->log, KEEL_ERR_ARG, "a context of %u tokens is above the model's %u", s->n_ctx, c->context);
    }
    KEEL_TRY(keel_kv_type_parse(params ? params->kv : NULL, &s->kv_type, model->log));
    const uint64_t range = keel_device_caps(model->dev)->max_range;
    if (4ull * s->n_batch * KEEL_MAX(c->ff_width, keel_q_width(c)) > range ||
        s->n_ctx * keel_kv_row_bytes(c, s->kv_type) > range || 4ull * KEEL_ATTENTION_GROUP * c->n_heads * s->n_ctx > range) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED,
                  "a context of %u tokens in batches of %u does not fit this device's bindings of %.0f MB; lower --ctx or "
                  "--batch-tokens", s->n_ctx, s->n_batch, (double)range / 1e6);
    }
    s->chunk = keel_logit_rows(c, KEEL_MIN(64u, s->n_batch), range);
    s->logits_host = malloc(c->vocab * sizeof *s->logits_host);
    s->ids = malloc(s->n_ctx * sizeof *s->ids);
    s->candidates = malloc(c->vocab * sizeof *s->candidates);
    if (!s->logits_host || !s->ids || !s->candidates) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "no memory for a session");
    }
    KEEL_TRY(keel_batch_init(&s->batch, c, model->log));
    KEEL_TRY(keel_layout_make(&s->host, model->dev, KEEL_HEAP_HOST, "batch", want_host, s));
    KEEL_TRY(keel_layout_make(&s->heap, model->dev, KEEL_HEAP_DEVICE, "activations", want_device, s));
    KEEL_TRY(keel_recorder_create(&s->rec, model->dev, NULL));
    KEEL_TRY(keel_recorder_create(&s->step, model->dev, &(struct keel_recorder_params){ .replay = true }));
    *out = s;
    s = NULL;
out:
    keel_session_destroy(&s);
    return st;
}

static void free_cache(struct session_cache *c)
{
    keel_heap_destroy(&c->heap);
    free(c->kv.k);
    free(c->kv.v);
    *c = (struct session_cache){ 0 };
}

void keel_session_destroy(keel_session **session)
{
    keel_session *s = session ? *session : NULL;
    if (!s) {
        return;
    }
    keel_recorder_destroy(&s->rec);
    keel_recorder_destroy(&s->step);
    for (uint32_t i = 0; i < s->n_adapters; i++) {
        keel_adapter_destroy(&s->adapters[i]);
    }
    for (uint32_t i = 0; i < KEEL_COUNT(s->cache); i++) {
        free_cache(&s->cache[i]);
    }
    keel_heap_destroy(&s->second);
    keel_heap_destroy(&s->lora);
    keel_heap_destroy(&s->heap);
    keel_heap_destroy(&s->host);
    keel_batch_finish(&s->batch);
    free(s->adapters);
    free(s->logits_host);
    free(s->ids);
    free(s->candidates);
    free(s);
    *session = NULL;
}

struct cache_want {
    keel_session *s;
    struct session_cache *c;
};

static void want_cache(struct keel_layout *l, void *user)
{
    const struct cache_want *w = user;
    keel_kv_layout(l, &w->c->kv, &w->s->model->cfg, w->s->n_ctx, w->s->n_batch);
}

keel_status keel_session_cache(keel_session *s, uint32_t which, const struct keel_kv **kv)
{
    keel_status st = KEEL_OK;
    struct session_cache *c = &s->cache[which];
    *kv = NULL;
    if (!c->heap) {
        const uint32_t n = s->model->cfg.n_layers;
        c->kv.type = s->kv_type;
        c->kv.k = calloc(n, sizeof *c->kv.k);
        c->kv.v = calloc(n, sizeof *c->kv.v);
        if (!c->kv.k || !c->kv.v) {
            KEEL_FAIL(s->model->log, KEEL_ERR_NO_MEMORY, "no memory for a key/value cache");
        }
        KEEL_TRY(keel_layout_make(&c->heap, s->model->dev, KEEL_HEAP_DEVICE, "kv cache", want_cache, &(struct cache_want){ s, c }));
        keel_kv_clear(s->rec, &c->kv, &s->model->cfg);
        KEEL_TRY(keel_recorder_submit(s->rec));
    }
    *kv = &c->kv;
out:
    if (st != KEEL_OK) {
        free_cache(c);
    }
    return st;
}

// --- adapters ------------------------------------------------------------------------------------

static void want_lora(struct keel_layout *l, void *user)
{
    keel_session *s = user;
    keel_lora_layout(l, &s->acts, s->n_batch, s->lora_rank);
}

keel_status keel_session_add_adapter(keel_session *s, const char *path, float scale)
{
    keel_status st = KEEL_OK;
    keel_adapter *a = NULL;
    KEEL_TRY(keel_adapter_load(&a, s->model, path, scale));
    keel_adapter **p = realloc(s->adapters, (s->n_adapters + 1) * sizeof *p);
    if (!p) {
        KEEL_FAIL(s->model->log, KEEL_ERR_NO_MEMORY, "no memory for an adapter");
    }
    s->adapters = p;
    if (a->rank > s->lora_rank) {
        keel_heap_destroy(&s->lora);
        s->lora_rank = a->rank;
        KEEL_TRY(keel_layout_make(&s->lora, s->model->dev, KEEL_HEAP_DEVICE, "LoRA activations", want_lora, s));
    }
    s->adapters[s->n_adapters++] = a;
    s->bucket = 0; // the recorded step knows nothing of it
    a = NULL;
out:
    keel_adapter_destroy(&a);
    return st;
}

void keel_session_clear_adapters(keel_session *s)
{
    for (uint32_t i = 0; i < s->n_adapters; i++) {
        keel_adapter_destroy(&s->adapters[i]);
    }
    s->n_adapters = 0;
    s->bucket = 0;
}

struct keel_pass keel_session_pass(const keel_session *s, keel_recorder *rec, bool adapted)
{
    return (struct keel_pass){ .rec = rec, .model = s->model, .batch = &s->batch, .acts = &s->acts,
                               .adapters = (const keel_adapter *const *)s->adapters, .n_adapters = adapted ? s->n_adapters : 0,
                               .hooks = adapted ? s->hooks : NULL };
}

keel_status keel_session_set_hooks(keel_session *s, const keel_hooks *hooks)
{
    if (keel_hooks_count_steps(hooks)) {
        KEEL_ERROR(s->model->log, "a hook with a schedule over training steps: nothing is trained here; use one over tokens");
        return KEEL_ERR_ARG;
    }
    const keel_status st = keel_batch_set_hooks(&s->batch, hooks);
    s->hooks = st == KEEL_OK && hooks && keel_hooks_count(hooks) > 0 ? hooks : NULL;
    s->bucket = 0;
    return st;
}

// --- the sequence --------------------------------------------------------------------------------

void keel_session_record_logits(const keel_session *s, const struct keel_pass *p, uint32_t n)
{
    const struct keel_gemma3 *c = &s->model->cfg;
    keel_gather_rows(p->rec, s->acts.x, s->batch.place, s->scorer.rows[0], n, c->width);
    keel_rmsnorm(p->rec, &(struct keel_rmsnorm_params){ .x = s->scorer.rows[0], .w = s->model->w.output_norm,
                                                        .y = s->scorer.rows[0], .n_rows = n, .width = c->width, .eps = c->eps });
    keel_pass_head(p, s->scorer.rows[0], s->scorer.logits[0], n);
}

uint32_t keel_session_bucket(uint32_t n)
{
    uint32_t bucket = MIN_BUCKET;
    while (bucket < n) {
        bucket *= 2;
    }
    return bucket;
}

static keel_status fetch_logits(keel_session *s)
{
    keel_status st = KEEL_OK;
    const uint32_t vocab = s->model->cfg.vocab;
    KEEL_TRY(keel_download(s->model->dev, s->logits_host, keel_span_sub(s->scorer.logits[0], 0, 4ull * vocab), 4ull * vocab));
    for (uint32_t i = 0; i < vocab; i++) {
        if (!isfinite(s->logits_host[i])) {
            KEEL_FAIL(s->model->log, KEEL_ERR_NUMERIC,
                      "the logits after %u tokens hold NaN or infinity; run `keel devices` and report the driver", s->n_ids);
        }
    }
    s->has_logits = true;
out:
    return st;
}

// The next tokens of the sequence as the batch; `row` without its position.
static keel_status fill_batch(keel_session *s, struct keel_batch_row row)
{
    uint32_t first;
    row.pos = s->n_ids;
    row.cached = true;
    row.prompt = s->n_prompt;
    keel_batch_clear(&s->batch);
    const keel_status st = keel_batch_add(&s->batch, &row, &first);
    if (st == KEEL_OK) {
        keel_batch_place(&s->batch, row.n - 1, 0, 0.0f);
        keel_batch_ready(&s->batch, s->model->dev);
    }
    return st;
}

static void record_pass(const keel_session *s, const struct keel_pass *p, bool logits)
{
    keel_pass_embed(p);
    keel_pass_blocks(p);
    if (logits) {
        keel_session_record_logits(s, p, 1);
    }
}

// Compiles what a pass needs, several pipelines at once. Not with hooks: who captures counts what is recorded.
static void compile_pass(const keel_session *s, const struct keel_pass *p)
{
    if (!p->hooks) {
        keel_recorder_note(p->rec, true);
        record_pass(s, p, true);
        keel_recorder_note(p->rec, false);
    }
}

// One token through the recorded step; records it first for contexts up to the next power of two.
static keel_status append_one(keel_session *s, const struct keel_kv *kv, int32_t id)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(fill_batch(s, (struct keel_batch_row){ .ids = &id, .n = 1, .decode = true }));
    if (s->n_ids + 1 > s->bucket) {
        struct keel_pass p = keel_session_pass(s, s->step, true);
        p.kv = kv;
        p.bucket = KEEL_MIN(keel_session_bucket(s->n_ids + 1), s->n_ctx);
        s->bucket = 0;
        keel_recorder_reset(s->step);
        compile_pass(s, &p);
        record_pass(s, &p, true);
        KEEL_TRY(keel_recorder_submit(s->step));
        s->bucket = p.bucket;
    } else {
        KEEL_TRY(keel_recorder_replay(s->step));
    }
    KEEL_TRY(keel_recorder_wait(s->step));
out:
    if (st != KEEL_OK) {
        s->bucket = 0;
    }
    return st;
}

static keel_status append_chunk(keel_session *s, const struct keel_kv *kv, struct keel_batch_row row, bool last)
{
    keel_status st = KEEL_OK;
    struct keel_pass p = keel_session_pass(s, s->rec, true);
    p.kv = kv;
    KEEL_TRY(fill_batch(s, row));
    if (!s->compiled) {
        compile_pass(s, &p);
        s->compiled = true;
    }
    record_pass(s, &p, last);
    KEEL_TRY(keel_recorder_submit(s->rec));
    KEEL_TRY(keel_recorder_wait(s->rec));
out:
    if (st != KEEL_OK) {
        keel_recorder_reset(s->rec);
    }
    return st;
}

keel_status keel_session_append(keel_session *s, const int32_t *ids, size_t n)
{
    return keel_session_append_images(s, ids, n, NULL, 0);
}

keel_status keel_session_append_images(keel_session *s, const int32_t *ids, size_t n, const struct keel_image_tokens *images,
                                       uint32_t n_images)
{
    keel_status st = KEEL_OK;
    const struct keel_kv *kv;
    if (n == 0 || n > s->n_ctx - s->n_ids) {
        KEEL_FAIL(s->model->log, KEEL_ERR_ARG, "%zu tokens to append, but the context of %u has room for 1 to %u; raise --ctx", n,
                  s->n_ctx, s->n_ctx - s->n_ids);
    }
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= s->model->cfg.vocab) {
            KEEL_FAIL(s->model->log, KEEL_ERR_ARG, "token id %d is outside the vocabulary of %u", ids[i], s->model->cfg.vocab);
        }
    }
    KEEL_TRY(keel_images_check(images, n_images, (uint32_t)n, s->n_batch, "tokens to append", s->model->log));
    if (n_images > 0) {
        KEEL_TRY(keel_batch_make_image_room(&s->batch, s->model->dev));
    }
    KEEL_TRY(keel_session_cache(s, 0, &kv));
    s->has_logits = false;
    if (n > 1 || s->n_ids == 0) {
        s->n_prompt = s->n_ids + (uint32_t)n; // tokens that come one by one belong to the response
    }
    if (n == 1 && n_images == 0) {
        KEEL_TRY(append_one(s, kv, ids[0]));
        s->ids[s->n_ids++] = ids[0];
    } else {
        for (uint32_t i = 0, end; i < n; i = end) {
            end = keel_batch_cut(images, n_images, i, (uint32_t)KEEL_MIN(i + (uint64_t)s->n_batch, n));
            const struct keel_batch_row row = { .ids = ids + i, .n = end - i, .images = images, .n_images = n_images, .from = i };
            KEEL_TRY(append_chunk(s, kv, row, end == n));
            memcpy(s->ids + s->n_ids, ids + i, row.n * sizeof *ids);
            s->n_ids += row.n;
        }
    }
    KEEL_TRY(fetch_logits(s));
out:
    return st;
}

const float *keel_session_logits(keel_session *s)
{
    return s->has_logits ? s->logits_host : NULL;
}

keel_status keel_session_sample(keel_session *s, const struct keel_sample_params *params, int32_t *id)
{
    static const struct keel_sample_params defaults = { KEEL_SAMPLE_DEFAULTS };
    if (!s->has_logits) {
        KEEL_ERROR(s->model->log, "there are no logits to sample from: append tokens first");
        return KEEL_ERR_ARG;
    }
    *id = keel_sample(s->logits_host, s->model->cfg.vocab, params ? params : &defaults, s->ids, s->n_ids, s->n_ids, s->candidates);
    return KEEL_OK;
}

keel_model *keel_session_model(const keel_session *s)
{
    return s->model;
}

const keel_log *keel_session_log(const keel_session *s)
{
    return s->model->log;
}

uint32_t keel_session_batch_tokens(const keel_session *s)
{
    return s->n_batch;
}

uint32_t keel_session_length(const keel_session *s)
{
    return s->n_ids;
}

keel_status keel_session_take_back(keel_session *s, uint32_t n)
{
    if (n > s->n_ids || n > s->n_batch) {
        KEEL_ERROR(s->model->log, "%u tokens cannot be taken back: the sequence has %u and a pass takes %u", n, s->n_ids, s->n_batch);
        return KEEL_ERR_ARG;
    }
    s->n_ids -= n;
    s->n_prompt = KEEL_MIN(s->n_prompt, s->n_ids);
    s->has_logits = false;
    return KEEL_OK;
}

void keel_session_reset(keel_session *s)
{
    s->n_ids = s->n_prompt = 0;
    s->has_logits = false;
}
