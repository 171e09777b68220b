// SPDX-License-Identifier: MIT
// gemma3/vision_tower.c: the pass of a SigLIP tower and Gemma 3's projector over one image.
// Owns the buffers and the order of ops. Source: transformers' modeling_siglip.py, Gemma3MultiModalProjector.
#include "vision_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FFN_ROWS 512u // patches that go through a feed-forward layer at once: 4304 wide, all 4096 would take 70 MB

struct keel_tower {
    keel_heap *heap, *host;
    keel_recorder *rec;
    struct keel_span spans;   // [n_patches] struct keel_token_span: every patch sees all
    struct keel_span patches; // [n_patches, 3·patch²]
    struct keel_span x;       // [n_patches, D] residual stream
    struct keel_span xn;      // [n_patches, D] normalised, then what attention puts out
    struct keel_span q, k, v; // [n_patches, D]; q is also the output of a half block before it is added to x
    struct keel_span up;      // [FFN_ROWS, F]
    struct keel_span p;       // attention probabilities of a chunk of patches
    struct keel_span pooled;  // [n_tokens, D]
    struct keel_span tokens;  // [n_tokens, out_width]
};

// --- life ----------------------------------------------------------------------------------------

struct tower_want {
    struct keel_tower *t;
    const struct keel_siglip *c;
};

static void want_device(struct keel_layout *l, void *user)
{
    const struct tower_want *w = user;
    const struct keel_siglip *c = w->c;
    struct keel_tower *t = w->t;
    const uint64_t row = 4ull * c->n_patches * c->width;
    keel_want(l, &t->patches, 4ull * c->n_patches * keel_patch_cols(c));
    keel_want(l, &t->x, row);
    keel_want(l, &t->xn, row);
    keel_want(l, &t->q, row);
    keel_want(l, &t->k, row);
    keel_want(l, &t->v, row);
    keel_want(l, &t->up, 4ull * KEEL_MIN(FFN_ROWS, c->n_patches) * c->ff_width);
    keel_want(l, &t->p, keel_attention_scratch(c->n_patches, c->n_heads, c->n_patches));
    keel_want(l, &t->pooled, 4ull * c->n_tokens * c->width);
    keel_want(l, &t->tokens, 4ull * c->n_tokens * c->out_width);
    keel_want(l, &t->spans, sizeof(struct keel_token_span) * c->n_patches);
}

uint64_t keel_tower_bytes(const struct keel_siglip *c)
{
    struct keel_tower unused;
    struct tower_want want = {&unused, c};
    struct keel_layout count = {0};
    want_device(&count, &want);
    return count.bytes;
}

static keel_status upload_spans(const struct keel_tower *t, keel_device *dev, uint32_t n)
{
    struct keel_token_span *s = calloc(n, sizeof *s);
    if (!s) {
        KEEL_ERROR(keel_device_log(dev), "no memory for the patches of an image");
        return KEEL_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        s[i] = (struct keel_token_span){.lo = 0, .hi = n, .slot = i, .q_lo = 0, .q_hi = n};
    }
    const keel_status st = keel_upload(dev, t->spans, s, n * sizeof *s);
    free(s);
    return st;
}

keel_status keel_tower_create(struct keel_tower **out, const keel_vision *v)
{
    keel_status st = KEEL_OK;
    const struct keel_siglip *c = &v->cfg;
    const uint64_t range = keel_device_caps(v->dev)->max_range;
    struct keel_tower *t = calloc(1, sizeof *t);
    struct tower_want want = {t, c};
    *out = NULL;
    if (!t) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "no memory for a vision tower");
    }
    const uint64_t widest = KEEL_MAX(c->width, keel_patch_cols(c));
    if (4ull * c->n_patches * widest > range || 4ull * KEEL_ATTENTION_GROUP * c->n_heads * c->n_patches > range) {
        KEEL_FAIL(v->log, KEEL_ERR_UNSUPPORTED, "%s: %u patches of an image do not fit this device's bindings of %.0f MB",
                  v->info.path, c->n_patches, (double)range / 1e6);
    }
    KEEL_TRY(keel_layout_make(&t->heap, v->dev, KEEL_HEAP_DEVICE, "vision activations", want_device, &want));
    KEEL_TRY(upload_spans(t, v->dev, c->n_patches));
    KEEL_TRY(keel_recorder_create(&t->rec, v->dev, NULL));
    *out = t;
    t = NULL;
out:
    keel_tower_destroy(&t);
    return st;
}

void keel_tower_destroy(struct keel_tower **tower)
{
    struct keel_tower *t = tower ? *tower : NULL;
    if (!t) {
        return;
    }
    keel_recorder_destroy(&t->rec);
    keel_heap_destroy(&t->heap);
    free(t);
    *tower = NULL;
}

// --- the pass ------------------------------------------------------------------------------------

static struct keel_span rows_of(struct keel_span s, uint32_t first, uint32_t n, uint32_t width)
{
    return keel_span_sub(s, 4ull * first * width, 4ull * n * width);
}

// y = W x + b (+ residual)
static void project(keel_recorder *rec, const struct keel_siglip_block *b, enum keel_siglip_proj proj, struct keel_span x,
                    struct keel_span y, struct keel_span residual, uint32_t n)
{
    const struct keel_matrix *w = &b->w[proj];
    keel_linear(rec, &(struct keel_linear_params){.w = w, .x = x, .y = y, .n_tokens = n});
    keel_bias(rec, &(struct keel_bias_params){.x = y,
                                              .b = b->b[proj],
                                              .y = residual.bytes ? residual : y,
                                              .residual = residual,
                                              .n_rows = n,
                                              .width = w->rows});
}

static void norm(const keel_vision *v, struct keel_span x, struct keel_span w, struct keel_span b, struct keel_span y)
{
    keel_layernorm(v->tower->rec, &(struct keel_layernorm_params){.x = x,
                                                                  .w = w,
                                                                  .b = b,
                                                                  .y = y,
                                                                  .n_rows = v->cfg.n_patches,
                                                                  .width = v->cfg.width,
                                                                  .eps = v->cfg.eps});
}

static void attention(const keel_vision *v)
{
    const struct keel_siglip *c = &v->cfg;
    const struct keel_tower *t = v->tower;
    keel_attention(t->rec, &(struct keel_attention_params){.q = t->q,
                                                           .k = t->k,
                                                           .v = t->v,
                                                           .spans = t->spans,
                                                           .o = t->xn,
                                                           .p = t->p,
                                                           .n_tokens = c->n_patches,
                                                           .n_heads = c->n_heads,
                                                           .n_kv_heads = c->n_heads,
                                                           .head_dim = c->head_dim,
                                                           .kv_rows = c->n_patches,
                                                           .max_span = c->n_patches,
                                                           .max_union = c->n_patches,
                                                           .scale = 1.0f / sqrtf((float)c->head_dim)});
}

// x = block(x)
static void block(const keel_vision *v, uint32_t layer)
{
    const struct keel_siglip *c = &v->cfg;
    const struct keel_siglip_block *b = &v->w.block[layer];
    const struct keel_tower *t = v->tower;
    const struct keel_span nothing = {0};
    const uint32_t n = c->n_patches;
    norm(v, t->x, b->norm[KEEL_V_LN1], b->norm_bias[KEEL_V_LN1], t->xn);
    project(t->rec, b, KEEL_V_Q, t->xn, t->q, nothing, n);
    project(t->rec, b, KEEL_V_K, t->xn, t->k, nothing, n);
    project(t->rec, b, KEEL_V_V, t->xn, t->v, nothing, n);
    attention(v);
    project(t->rec, b, KEEL_V_OUT, t->xn, t->q, t->x, n);
    norm(v, t->x, b->norm[KEEL_V_LN2], b->norm_bias[KEEL_V_LN2], t->xn);
    for (uint32_t i = 0; i < n; i += FFN_ROWS) {
        const uint32_t m = KEEL_MIN(FFN_ROWS, n - i);
        const struct keel_span up = rows_of(t->up, 0, m, c->ff_width);
        project(t->rec, b, KEEL_V_UP, rows_of(t->xn, i, m, c->width), up, nothing, m);
        keel_gelu(t->rec, up, up, (uint64_t)m * c->ff_width);
        project(t->rec, b, KEEL_V_DOWN, up, rows_of(t->q, i, m, c->width), rows_of(t->x, i, m, c->width), m);
    }
}

static void record(const keel_vision *v)
{
    const struct keel_siglip *c = &v->cfg;
    const struct keel_siglip_weights *w = &v->w;
    const struct keel_tower *t = v->tower;
    keel_linear(t->rec, &(struct keel_linear_params){.w = &w->patch, .x = t->patches, .y = t->x, .n_tokens = c->n_patches});
    keel_bias(t->rec, &(struct keel_bias_params){.x = t->x,
                                                 .b = w->patch_bias,
                                                 .y = t->x,
                                                 .residual = w->position,
                                                 .n_rows = c->n_patches,
                                                 .width = c->width});
    for (uint32_t i = 0; i < c->n_layers; i++) {
        block(v, i);
    }
    norm(v, t->x, w->post_norm, w->post_norm_bias, t->xn);
    keel_pool(t->rec, &(struct keel_pool_params){
                          .x = t->xn, .y = t->pooled, .grid = c->grid, .kernel = c->kernel, .width = c->width});
    keel_rmsnorm(t->rec, &(struct keel_rmsnorm_params){.x = t->pooled,
                                                       .w = w->soft_norm,
                                                       .y = t->pooled,
                                                       .n_rows = c->n_tokens,
                                                       .width = c->width,
                                                       .eps = c->eps});
    keel_linear(t->rec, &(struct keel_linear_params){.w = &w->proj, .x = t->pooled, .y = t->tokens, .n_tokens = c->n_tokens});
}

keel_status keel_tower_run(const keel_vision *v, const float *patches, float *tokens)
{
    keel_status st = KEEL_OK;
    const struct keel_tower *t = v->tower;
    const size_t n = (size_t)v->cfg.n_tokens * v->cfg.out_width;
    keel_recorder_reset(t->rec);
    KEEL_TRY(keel_upload(v->dev, t->patches, patches, (size_t)v->cfg.n_patches * keel_patch_cols(&v->cfg) * sizeof *patches));
    record(v);
    KEEL_TRY(keel_recorder_submit(t->rec));
    KEEL_TRY(keel_recorder_wait(t->rec));
    KEEL_TRY(keel_download(v->dev, tokens, t->tokens, n * sizeof *tokens));
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(tokens[i])) {
            KEEL_FAIL(v->log, KEEL_ERR_NUMERIC, "%s: the tower's output is not finite (token %zu)", v->info.path,
                      i / v->cfg.out_width);
        }
    }
out:
    return st;
}
