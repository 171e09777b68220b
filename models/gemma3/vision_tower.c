// SPDX-License-Identifier: MIT
// gemma3/vision_tower.c: the forward pass of a SigLIP tower and Gemma 3's projector over one image, with LoRA where an adapter has
// pairs. Owns the buffers of inference and the order of ops. The way back is vision_train.c.
// Source: transformers' modeling_siglip.py, Gemma3MultiModalProjector.
#include "vision_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct keel_tower {
    keel_heap *heap, *lora;
    uint32_t rank; // adapter width that `lora` was made for
    keel_recorder *rec;
    struct keel_tower_acts acts;
    struct keel_tower_hooks hooks;
};

// --- layout --------------------------------------------------------------------------------------

void keel_tower_layout(struct keel_layout *l, struct keel_tower_acts *a, const struct keel_siglip *c, bool keep)
{
    const uint64_t row = 4ull * c->n_patches * c->width, ffn = 4ull * KEEL_MIN(KEEL_FFN_ROWS, c->n_patches) * c->ff_width;
    keel_want(l, &a->patches, 4ull * c->n_patches * keel_patch_cols(c));
    keel_want(l, &a->x, row);
    keel_want(l, &a->xn, row);
    keel_want(l, &a->q, row);
    keel_want(l, &a->k, row);
    keel_want(l, &a->v, row);
    keel_want(l, &a->up, ffn);
    if (keep) {
        keel_want(l, &a->o, row);
        keel_want(l, &a->half, row);
        keel_want(l, &a->x1, row);
        keel_want(l, &a->fn, row);
        keel_want(l, &a->act, ffn);
        keel_want(l, &a->normed, 4ull * c->n_tokens * c->width);
    } else {
        a->o = a->fn = a->xn;
        a->half = a->q;
        a->x1 = a->x;
        a->act = a->up;
    }
    keel_want(l, &a->p, keel_attention_scratch(c->n_patches, c->n_heads, c->n_patches));
    keel_want(l, &a->pooled, 4ull * c->n_tokens * c->width);
    keel_want(l, &a->tokens, 4ull * c->n_tokens * c->out_width);
    keel_want(l, &a->spans, sizeof(struct keel_token_span) * c->n_patches);
    if (!keep) {
        a->normed = a->pooled;
    }
}

void keel_tower_lora_layout(struct keel_layout *l, struct keel_tower_acts *a, const struct keel_siglip *c, uint32_t rank)
{
    for (uint32_t i = 0; i <= KEEL_V_N_PROJ; i++) {
        keel_want(l, &a->h[i], 4ull * (i < KEEL_V_N_PROJ ? c->n_patches : c->n_tokens) * rank);
    }
}

keel_status keel_tower_spans(const struct keel_tower_acts *a, keel_device *dev, uint32_t n)
{
    struct keel_token_span *s = calloc(n, sizeof *s);
    if (!s) {
        KEEL_ERROR(keel_device_log(dev), "no memory for the patches of an image");
        return KEEL_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n; i++) {
        s[i] = (struct keel_token_span){.lo = 0, .hi = n, .slot = i, .q_lo = 0, .q_hi = n};
    }
    const keel_status st = keel_upload(dev, a->spans, s, n * sizeof *s);
    free(s);
    return st;
}

// --- the pass ------------------------------------------------------------------------------------

// y = W x + b, and what adapters add, (+ residual); y may be the residual
static void project(const struct keel_tower_pass *p, uint32_t layer, enum keel_siglip_proj proj, struct keel_span x, struct keel_span y,
                    struct keel_span residual, uint32_t n)
{
    const struct keel_siglip_block *b = &p->v->w.block[layer];
    const struct keel_matrix *w = &b->w[proj];
    const struct keel_span wx = residual.bytes > 0 ? p->a->half : y;
    keel_linear(p->rec, &(struct keel_linear_params){.w = w, .x = x, .y = wx, .n_tokens = n});
    for (uint32_t i = 0; i < p->n_adapters; i++) {
        const struct keel_lora *pair = keel_vision_pair(p->adapters[i], layer, proj);
        if (pair) {
            keel_lora_down(p->rec, pair, x, p->a->h[proj], n);
            keel_lora_up(p->rec, pair, p->a->h[proj], wx, n);
        }
    }
    keel_bias(p->rec, &(struct keel_bias_params){
                          .x = wx, .b = b->b[proj], .y = y, .residual = residual, .n_rows = n, .width = w->rows});
}

static void norm(const struct keel_tower_pass *p, struct keel_span x, struct keel_span w, struct keel_span b, struct keel_span y)
{
    keel_layernorm(p->rec, &(struct keel_layernorm_params){.x = x,
                                                           .w = w,
                                                           .b = b,
                                                           .y = y,
                                                           .n_rows = p->v->cfg.n_patches,
                                                           .width = p->v->cfg.width,
                                                           .eps = p->v->cfg.eps});
}

// Adds a->half, what a branch of the block adds, to the stream that it branched off from, after the hooks there. Only in passes of
// which nothing is kept, where the stream has one buffer.
static void add_hooked(const struct keel_tower_pass *p, uint32_t layer, enum keel_site site, struct keel_span x)
{
    keel_tower_apply(p, site, layer, p->a->half);
    keel_axpy(p->rec, 1.0f, p->a->half, x, (uint64_t)p->v->cfg.n_patches * p->v->cfg.width);
}

void keel_tower_attention_half(const struct keel_tower_pass *p, uint32_t layer, struct keel_span x)
{
    const struct keel_siglip *c = &p->v->cfg;
    const struct keel_siglip_block *b = &p->v->w.block[layer];
    const struct keel_tower_acts *a = p->a;
    const struct keel_span nothing = {0};
    const uint32_t n = c->n_patches;
    norm(p, x, b->norm[KEEL_V_LN1], b->norm_bias[KEEL_V_LN1], a->xn);
    project(p, layer, KEEL_V_Q, a->xn, a->q, nothing, n);
    project(p, layer, KEEL_V_K, a->xn, a->k, nothing, n);
    project(p, layer, KEEL_V_V, a->xn, a->v, nothing, n);
    keel_attention(p->rec, &(struct keel_attention_params){.q = a->q,
                                                           .k = a->k,
                                                           .v = a->v,
                                                           .spans = a->spans,
                                                           .o = a->o,
                                                           .p = a->p,
                                                           .n_tokens = n,
                                                           .n_heads = c->n_heads,
                                                           .n_kv_heads = c->n_heads,
                                                           .head_dim = c->head_dim,
                                                           .kv_rows = n,
                                                           .max_span = n,
                                                           .max_union = n,
                                                           .scale = keel_siglip_scale(c),
                                                           .all = true});
    if (keel_tower_hooked(p, KEEL_SITE_TOWER_ATTN, layer)) {
        project(p, layer, KEEL_V_OUT, a->o, a->half, nothing, n);
        add_hooked(p, layer, KEEL_SITE_TOWER_ATTN, a->x1);
    } else {
        project(p, layer, KEEL_V_OUT, a->o, a->x1, x, n);
    }
    norm(p, a->x1, b->norm[KEEL_V_LN2], b->norm_bias[KEEL_V_LN2], a->fn);
}

void keel_tower_ffn_rows(const struct keel_tower_pass *p, uint32_t layer, uint32_t first, uint32_t n)
{
    const struct keel_siglip *c = &p->v->cfg;
    const struct keel_tower_acts *a = p->a;
    project(p, layer, KEEL_V_UP, keel_rows(a->fn, first, n, c->width), keel_rows(a->up, 0, n, c->ff_width), (struct keel_span){0}, n);
    keel_gelu(p->rec, a->up, a->act, (uint64_t)n * c->ff_width);
}

void keel_tower_block(const struct keel_tower_pass *p, uint32_t layer, struct keel_span x, struct keel_span y)
{
    const struct keel_siglip *c = &p->v->cfg;
    const struct keel_tower_acts *a = p->a;
    const bool hooked = keel_tower_hooked(p, KEEL_SITE_TOWER_MLP, layer);
    keel_tower_apply(p, KEEL_SITE_TOWER_PRE, layer, x);
    keel_tower_attention_half(p, layer, x);
    for (uint32_t i = 0; i < c->n_patches; i += KEEL_FFN_ROWS) {
        const uint32_t m = KEEL_MIN(KEEL_FFN_ROWS, c->n_patches - i);
        keel_tower_ffn_rows(p, layer, i, m);
        project(p, layer, KEEL_V_DOWN, a->act, keel_rows(hooked ? a->half : y, i, m, c->width),
                hooked ? (struct keel_span){0} : keel_rows(a->x1, i, m, c->width), m);
    }
    if (hooked) {
        add_hooked(p, layer, KEEL_SITE_TOWER_MLP, y);
    }
    keel_tower_apply(p, KEEL_SITE_TOWER_POST, layer, y);
}

void keel_tower_embed(const struct keel_tower_pass *p, struct keel_span x)
{
    const struct keel_siglip *c = &p->v->cfg;
    const struct keel_siglip_weights *w = &p->v->w;
    keel_linear(p->rec, &(struct keel_linear_params){.w = &w->patch, .x = p->a->patches, .y = x, .n_tokens = c->n_patches});
    keel_bias(p->rec, &(struct keel_bias_params){
                          .x = x, .b = w->patch_bias, .y = x, .residual = w->position, .n_rows = c->n_patches, .width = c->width});
}

void keel_tower_project(const struct keel_tower_pass *p, struct keel_span x)
{
    const struct keel_siglip *c = &p->v->cfg;
    const struct keel_siglip_weights *w = &p->v->w;
    const struct keel_tower_acts *a = p->a;
    norm(p, x, w->post_norm, w->post_norm_bias, a->xn);
    keel_pool(p->rec, &(struct keel_pool_params){
                          .x = a->xn, .y = a->pooled, .grid = c->grid, .kernel = c->kernel, .width = c->width});
    keel_rmsnorm(p->rec, &(struct keel_rmsnorm_params){.x = a->pooled,
                                                       .w = w->soft_norm,
                                                       .y = a->normed,
                                                       .n_rows = c->n_tokens,
                                                       .width = c->width,
                                                       .eps = c->eps});
    keel_linear(p->rec, &(struct keel_linear_params){.w = &w->proj, .x = a->normed, .y = a->tokens, .n_tokens = c->n_tokens});
    for (uint32_t i = 0; i < p->n_adapters; i++) {
        const struct keel_lora *pair = keel_vision_pair(p->adapters[i], c->n_layers, 0);
        if (pair) {
            keel_lora_down(p->rec, pair, a->normed, a->h[KEEL_V_N_PROJ], c->n_tokens);
            keel_lora_up(p->rec, pair, a->h[KEEL_V_N_PROJ], a->tokens, c->n_tokens);
        }
    }
}

keel_status keel_tower_read(const struct keel_tower_pass *p, float *tokens)
{
    keel_status st = KEEL_OK;
    const size_t n = (size_t)p->v->cfg.n_tokens * p->v->cfg.out_width;
    KEEL_TRY(keel_recorder_submit(p->rec));
    KEEL_TRY(keel_recorder_wait(p->rec));
    KEEL_TRY(keel_download(p->v->dev, tokens, p->a->tokens, n * sizeof *tokens));
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(tokens[i])) {
            KEEL_FAIL(p->v->log, KEEL_ERR_NUMERIC, "%s: the tower's output is not finite (token %zu)", p->v->info.path,
                      i / p->v->cfg.out_width);
        }
    }
out:
    return st;
}

// --- inference -----------------------------------------------------------------------------------

struct tower_want {
    struct keel_tower_acts *a;
    const struct keel_siglip *c;
    uint32_t rank;
};

static void want_device(struct keel_layout *l, void *user)
{
    const struct tower_want *w = user;
    keel_tower_layout(l, w->a, w->c, false);
}

static void want_lora(struct keel_layout *l, void *user)
{
    const struct tower_want *w = user;
    keel_tower_lora_layout(l, w->a, w->c, w->rank);
}

uint64_t keel_tower_bytes(const struct keel_siglip *c)
{
    struct keel_tower_acts unused = {0};
    struct keel_layout count = {0};
    keel_tower_layout(&count, &unused, c, false);
    return count.bytes;
}

keel_status keel_tower_create(struct keel_tower **out, const keel_vision *v)
{
    keel_status st = KEEL_OK;
    const struct keel_siglip *c = &v->cfg;
    struct keel_tower *t = calloc(1, sizeof *t);
    *out = NULL;
    if (!t) {
        KEEL_FAIL(v->log, KEEL_ERR_NO_MEMORY, "no memory for a vision tower");
    }
    struct tower_want want = {.a = &t->acts, .c = c};
    KEEL_TRY(keel_layout_make(&t->heap, v->dev, KEEL_HEAP_DEVICE, "vision activations", want_device, &want));
    KEEL_TRY(keel_tower_spans(&t->acts, v->dev, c->n_patches));
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
    keel_tower_hooks_finish(&t->hooks);
    keel_heap_destroy(&t->lora);
    keel_heap_destroy(&t->heap);
    free(t);
    *tower = NULL;
}

keel_status keel_tower_run(const keel_vision *v, const float *patches, float *tokens)
{
    keel_status st = KEEL_OK;
    struct keel_tower *t = v->tower;
    const struct keel_siglip *c = &v->cfg;
    const struct keel_tower_pass pass = {
        .rec = t->rec, .v = v, .a = &t->acts, .adapters = v->adapters, .n_adapters = v->n_adapters, .hooks = &t->hooks};
    const uint32_t rank = keel_vision_rank(&pass);
    if (rank > t->rank) {
        struct tower_want want = {.a = &t->acts, .c = c, .rank = rank};
        keel_heap_destroy(&t->lora);
        KEEL_TRY(keel_layout_make(&t->lora, v->dev, KEEL_HEAP_DEVICE, "vision LoRA activations", want_lora, &want));
        t->rank = rank;
    }
    keel_recorder_reset(t->rec);
    KEEL_TRY(keel_tower_hooks_make(&t->hooks, v));
    KEEL_TRY(keel_upload(v->dev, t->acts.patches, patches, (size_t)c->n_patches * keel_patch_cols(c) * sizeof *patches));
    keel_tower_embed(&pass, t->acts.x);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        if (keel_interrupted()) { // a block of the 4B's tower takes a CPU driver seconds
            st = KEEL_INTERRUPTED;
            goto out;
        }
        keel_tower_block(&pass, i, t->acts.x, t->acts.x);
    }
    keel_tower_project(&pass, t->acts.x);
    KEEL_TRY(keel_tower_read(&pass, tokens));
    KEEL_TRY(keel_tower_after(&pass));
out:
    return st;
}
