// SPDX-License-Identifier: MIT
// gemma3/plan.c: layouts: one piece of code counts memory for the plan and allocates it for the pass.
#include "vision_internal.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

void keel_want(struct keel_layout *l, struct keel_span *span, uint64_t bytes)
{
    const uint64_t at = l->bytes;
    *span = (struct keel_span){ 0 };
    if (bytes == 0 || l->st != KEEL_OK) {
        return;
    }
    l->bytes += keel_align_up(bytes, 256);
    if (l->whole.block) {
        *span = keel_span_sub(l->whole, at, bytes);
    } else if (l->heap) {
        l->st = keel_heap_alloc(l->heap, bytes, span);
    }
}

keel_status keel_layout_make(keel_heap **heap, keel_device *dev, enum keel_heap_kind kind, const char *label,
                             void (*want)(struct keel_layout *l, void *user), void *user)
{
    keel_status st = KEEL_OK;
    struct keel_layout count = { 0 }, take = { 0 };
    want(&count, user);
    KEEL_TRY(keel_heap_create(heap, dev, kind, label));
    if (count.bytes > 0 && count.bytes <= keel_device_caps(dev)->max_buffer) {
        KEEL_TRY(keel_heap_alloc(*heap, count.bytes, &take.whole));
    }
    take.heap = *heap;
    want(&take, user);
    KEEL_TRY(take.st);
out:
    if (st != KEEL_OK) {
        keel_heap_destroy(heap);
    }
    return st;
}

uint32_t keel_logit_rows(const struct keel_gemma3 *c, uint32_t want, uint64_t max_range)
{
    const uint64_t most = KEEL_MIN(max_range, UINT64_C(64) << 20) / (4ull * c->vocab);
    uint64_t rows = KEEL_MIN((uint64_t)want, KEEL_MAX(most, UINT64_C(1)));
    if (rows < want && rows > 16) {
        rows = rows / 16 * 16; // chunks must begin on 256-byte borders
    }
    return (uint32_t)rows;
}

void keel_kv_rows(const struct keel_gemma3 *c, uint32_t n_ctx, uint32_t n_batch, uint32_t rows[2])
{
    rows[KEEL_GLOBAL] = n_ctx;
    rows[KEEL_LOCAL] = c->window == 0 ? n_ctx : (uint32_t)KEEL_MIN((uint64_t)n_ctx, (uint64_t)c->window + n_batch);
}

keel_status keel_kv_type_parse(const char *text, enum keel_dtype *type, const keel_log *log)
{
    static const enum keel_dtype types[] = { KEEL_F32, KEEL_F16, KEEL_Q8_0 };
    *type = KEEL_F32;
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        if (!text || strcasecmp(text, keel_dtype_info(types[i])->name) == 0) {
            *type = text ? types[i] : KEEL_F32;
            return KEEL_OK;
        }
    }
    KEEL_ERROR(log, "key/value caches cannot be of type \"%s\": f32, f16 or q8_0", text);
    return KEEL_ERR_ARG;
}

uint64_t keel_kv_row_bytes(const struct keel_gemma3 *c, enum keel_dtype type)
{
    return c->n_kv_heads * keel_kv_head_bytes(type, c->head_dim);
}

void keel_kv_layout(struct keel_layout *l, struct keel_kv *kv, const struct keel_gemma3 *c, uint32_t n_ctx, uint32_t n_batch)
{
    keel_kv_rows(c, n_ctx, n_batch, kv->rows);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        struct keel_span dummy;
        const uint64_t bytes = kv->rows[c->kind[i]] * keel_kv_row_bytes(c, kv->type);
        keel_want(l, kv->k ? &kv->k[i] : &dummy, bytes);
        keel_want(l, kv->v ? &kv->v[i] : &dummy, bytes);
    }
}

void keel_kv_clear(keel_recorder *rec, const struct keel_kv *kv, const struct keel_gemma3 *c)
{
    for (uint32_t i = 0; i < c->n_layers; i++) {
        keel_record_fill(rec, kv->k[i], 0);
        keel_record_fill(rec, kv->v[i], 0);
    }
}

void keel_scorer_layout(struct keel_layout *l, struct keel_scorer *s, const struct keel_gemma3 *c, uint32_t places,
                        uint32_t chunk, uint32_t n_models)
{
    s->places = places;
    s->chunk = chunk;
    for (uint32_t i = 0; i < n_models; i++) {
        keel_want(l, &s->rows[i], 4ull * places * c->width);
        keel_want(l, &s->logits[i], 4ull * chunk * c->vocab);
    }
    keel_want(l, &s->partial, keel_xent_scratch(chunk, c->vocab));
    keel_want(l, &s->stats, 16ull * chunk);
}

// --- the plan ------------------------------------------------------------------------------------

// What a driver and its shader compiler take on the host. Measured on Mesa 22.3's llvmpipe: 75 MB of libraries, 60 MB of compiled
// shaders and the like. The plan is made before a device is opened, so it is the same for all.
#define DRIVER_BYTES (UINT64_C(128) << 20)

#define PLAN_RANGE (UINT64_C(128) << 20) // the smallest binding limit; larger ones change nothing at common sizes

static void row(struct keel_plan *p, const char *what, uint64_t bytes, bool host)
{
    if (bytes > 0 && p->n_rows < KEEL_COUNT(p->row)) {
        p->row[p->n_rows++] = (struct keel_plan_row){ what, bytes, host };
        *(host ? &p->host_bytes : &p->device_bytes) += bytes;
    }
}

// The embeddings of as many image tokens as a pass takes.
static void plan_images(struct keel_plan *out, const struct keel_gemma3 *c, uint32_t n_tokens)
{
    struct keel_layout l = { 0 };
    struct keel_batch b = { .c = c, .cap = n_tokens };
    keel_batch_image_layout(&l, &b);
    row(out, "image tokens", l.bytes, false);
}

static void plan_session(struct keel_plan *out, const struct keel_gemma3 *c, uint32_t n_ctx, uint32_t n_batch, enum keel_dtype type,
                         bool images)
{
    struct keel_layout kv = { 0 }, acts = { 0 }, logits = { 0 }, host = { 0 };
    struct keel_kv k = { .type = type };
    struct keel_acts a = { 0 };
    struct keel_scorer s = { 0 };
    struct keel_batch b = { .c = c };
    const uint32_t chunk = keel_logit_rows(c, KEEL_MIN(64u, n_batch), PLAN_RANGE);
    keel_kv_layout(&kv, &k, c, n_ctx, n_batch);
    keel_acts_layout(&acts, &a, c, n_batch, n_ctx, false, PLAN_RANGE);
    keel_scorer_layout(&logits, &s, c, n_batch, chunk, 1);
    keel_batch_layout(&host, &b, c, n_batch, n_batch, chunk);
    row(out, "kv cache", kv.bytes, false);
    row(out, "activations", acts.bytes, false);
    row(out, "logits", logits.bytes, false);
    row(out, "batch", host.bytes, false);
    if (images) {
        plan_images(out, c, n_batch);
    }
}

static keel_status plan_training(struct keel_plan *out, const keel_model *model, const struct keel_plan_params *p)
{
    keel_status st = KEEL_OK;
    uint32_t targets;
    uint8_t *layers = NULL;
    KEEL_TRY(keel_targets_parse(p->targets, &targets, model->log));
    if (p->layers) {
        layers = calloc(model->cfg.n_layers, 1);
        KEEL_TRY(layers ? keel_layers_parse(p->layers, layers, model->cfg.n_layers, model->log) : KEEL_ERR_NO_MEMORY);
    }
    const uint64_t lora = keel_adapter_bytes(model, p->train_rank, targets, layers);
    row(out, "LoRA weights", lora, false);
    row(out, "LoRA gradients", lora, false);
    row(out, "AdamW moments", 2 * lora, false);
    row(out, "other adapters of Lisa", p->train_lisa ? 2 * lora : 0, false);
    row(out, "adapter on its way to disk", lora, true);
    keel_trainer_plan(model, p->train_tokens, p->train_row, p->train_rank, out, row);
    if (p->train_constrain_tokens > 0) {
        row(out, "constrained loss", 8 * p->train_constrain_tokens + keel_trainer_extra_bytes(model, p->train_tokens, false), true);
    }
    if (p->train_kl_tokens > 0) {
        row(out, "base's predictions", sizeof(struct keel_top) * p->train_kl_tokens + keel_trainer_extra_bytes(model, p->train_tokens, true),
            true);
    }
    if (p->images) {
        plan_images(out, &model->cfg, p->train_tokens);
    }
    if (model->vision && (targets & KEEL_VISION_TARGETS)) {
        row(out, "vision weights", keel_siglip_weight_bytes(model->vision), false);
        row(out, "vision activations, gradients", keel_vision_trainer_bytes(model->vision, p->train_rank), false);
    }
out:
    free(layers);
    return st;
}

keel_status keel_model_plan(const keel_model *model, const struct keel_plan_params *params, struct keel_plan *out)
{
    const struct keel_gemma3 *c = &model->cfg;
    uint64_t embd, rest;
    *out = (struct keel_plan){ 0 };
    keel_gemma3_weight_bytes(model, &embd, &rest);
    row(out, "embedding and head", embd, false);
    row(out, "weights of the blocks", rest, false);
    if (params->n_ctx > 0) {
        enum keel_dtype type;
        const keel_status st = keel_kv_type_parse(params->kv, &type, model->log);
        if (st != KEEL_OK) {
            return st;
        }
        plan_session(out, c, params->n_ctx, params->n_batch ? params->n_batch : 256, type, params->images);
    }
    if (params->train_rank > 0) {
        const keel_status st = plan_training(out, model, params);
        if (st != KEEL_OK) {
            return st;
        }
    }
    row(out, "tokenizer and program", 64ull * c->vocab + (UINT64_C(12) << 20), true);
    row(out, "driver and shaders, about", DRIVER_BYTES, true);
    return KEEL_OK;
}
