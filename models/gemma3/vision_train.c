// SPDX-License-Identifier: MIT
// gemma3/vision_train.c: LoRA gradients through the projector and the SigLIP tower, one image at a time. The inputs of the blocks
// are kept; the inside of a block is computed again on the way back, its feed-forward layer in the same parts as forwards.
// Owns the buffers of such a pass. Gradients of soft tokens come from the language model (keel_trainer_input_grads()).
#include "vision_internal.h"

#include <stdlib.h>
#include <string.h>

struct vision_grads {
    struct keel_span x;            // [P, D] gradient of the residual stream
    struct keel_span t;            // [P, D]
    struct keel_span d_o, q, k, v; // [P, D]
    struct keel_span up;           // [KEEL_FFN_ROWS, F]
    struct keel_span ds;           // like the probabilities
    struct keel_span pooled;       // [n_tokens, D]
    struct keel_span tokens;       // [n_tokens, out_width]
    struct keel_span dh;           // [P, r]
};

struct keel_vision_trainer {
    keel_vision *v;
    uint32_t rank; // adapter width that `lora` was made for
    keel_heap *heap, *lora;
    keel_recorder *rec;
    struct keel_tower_acts acts;
    struct vision_grads g;
    struct keel_span *saved; // [n_layers] of [P, D]: block inputs
};

// --- life ----------------------------------------------------------------------------------------

static void want_device(struct keel_layout *l, void *user)
{
    keel_vision_trainer *t = user;
    const struct keel_siglip *c = &t->v->cfg;
    const uint64_t row = 4ull * c->n_patches * c->width;
    struct keel_span *const rows[] = {&t->g.x, &t->g.t, &t->g.d_o, &t->g.q, &t->g.k, &t->g.v};
    keel_tower_layout(l, &t->acts, c, true);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        struct keel_span unused;
        keel_want(l, t->saved ? &t->saved[i] : &unused, row);
    }
    for (size_t i = 0; i < KEEL_COUNT(rows); i++) {
        keel_want(l, rows[i], row);
    }
    keel_want(l, &t->g.up, 4ull * KEEL_MIN(KEEL_FFN_ROWS, c->n_patches) * c->ff_width);
    keel_want(l, &t->g.ds, keel_attention_scratch(c->n_patches, c->n_heads, c->n_patches));
    keel_want(l, &t->g.pooled, 4ull * c->n_tokens * c->width);
    keel_want(l, &t->g.tokens, 4ull * c->n_tokens * c->out_width);
}

static void want_lora(struct keel_layout *l, void *user)
{
    keel_vision_trainer *t = user;
    keel_tower_lora_layout(l, &t->acts, &t->v->cfg, t->rank);
    keel_want(l, &t->g.dh, 4ull * KEEL_MAX(t->v->cfg.n_patches, t->v->cfg.n_tokens) * t->rank);
}

uint64_t keel_vision_trainer_bytes(const keel_vision *vision, uint32_t rank)
{
    keel_vision_trainer t = {.v = (keel_vision *)(uintptr_t)vision, .rank = rank};
    struct keel_layout count = {0};
    want_device(&count, &t);
    want_lora(&count, &t);
    return count.bytes;
}

keel_status keel_vision_trainer_create(keel_vision_trainer **out, keel_vision *vision, keel_device *dev)
{
    keel_status st = KEEL_OK;
    keel_vision_trainer *t = calloc(1, sizeof *t);
    *out = NULL;
    if (!t || !(t->saved = calloc(vision->cfg.n_layers, sizeof *t->saved))) {
        KEEL_FAIL(vision->log, KEEL_ERR_NO_MEMORY, "no memory to train a vision tower");
    }
    t->v = vision;
    if (keel_hooks_tower_hash(vision->hooks, 0) != 0) {
        KEEL_FAIL(vision->log, KEEL_ERR_ARG, "%s: a tower cannot be trained while hooks sit in it; train the language model only, or steer at "
                  "its sites", vision->info.path);
    }
    KEEL_TRY(keel_vision_load(vision, dev));
    KEEL_TRY(keel_layout_make(&t->heap, dev, KEEL_HEAP_DEVICE, "vision training", want_device, t));
    KEEL_TRY(keel_tower_spans(&t->acts, dev, vision->cfg.n_patches));
    KEEL_TRY(keel_recorder_create(&t->rec, dev, NULL));
    *out = t;
    t = NULL;
out:
    keel_vision_trainer_destroy(&t);
    return st;
}

void keel_vision_trainer_destroy(keel_vision_trainer **trainer)
{
    keel_vision_trainer *t = trainer ? *trainer : NULL;
    if (!t) {
        return;
    }
    keel_recorder_destroy(&t->rec);
    keel_heap_destroy(&t->lora);
    keel_heap_destroy(&t->heap);
    free(t->saved);
    free(t);
    *trainer = NULL;
}

// --- forward -------------------------------------------------------------------------------------

// Uploads the patches of an image and records the whole way to the tokens; block inputs stay in t->saved, the last block's output
// in acts.x.
static keel_status record_forward(keel_vision_trainer *t, const struct keel_tower_pass *pass, struct keel_view view)
{
    keel_status st = KEEL_OK;
    const struct keel_siglip *c = &t->v->cfg;
    float *patches = NULL;
    const uint32_t rank = keel_vision_rank(pass);
    if (rank > t->rank) {
        keel_heap_destroy(&t->lora);
        t->rank = rank;
        KEEL_TRY(keel_layout_make(&t->lora, t->v->dev, KEEL_HEAP_DEVICE, "vision LoRA activations", want_lora, t));
    }
    KEEL_TRY(keel_vision_patches(t->v, view.path, view.index, &patches));
    keel_recorder_reset(t->rec);
    KEEL_TRY(keel_upload(t->v->dev, t->acts.patches, patches, (size_t)c->n_patches * keel_patch_cols(c) * sizeof *patches));
    keel_tower_embed(pass, t->saved[0]);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        keel_tower_block(pass, i, t->saved[i], i + 1 < c->n_layers ? t->saved[i + 1] : t->acts.x);
    }
    keel_tower_project(pass, t->acts.x);
out:
    free(patches);
    return st;
}

static struct keel_tower_pass pass_of(const keel_vision_trainer *t, const keel_adapter *const *adapter)
{
    return (struct keel_tower_pass){.rec = t->rec, .v = t->v, .a = &t->acts, .adapters = adapter, .n_adapters = 1};
}

keel_status keel_vision_trainer_forward(keel_vision_trainer *t, const keel_adapter *adapter, struct keel_view view, float *tokens)
{
    keel_status st = KEEL_OK;
    const struct keel_tower_pass pass = pass_of(t, &adapter);
    KEEL_TRY(record_forward(t, &pass, view));
    KEEL_TRY(keel_tower_read(&pass, tokens));
out:
    return st;
}

// --- backward ------------------------------------------------------------------------------------

struct back {
    keel_vision_trainer *t;
    const struct keel_tower_pass *pass;
    const keel_adapter *adapter;
    struct keel_span grads; // like adapter->params
};

static struct keel_span grad_of(const struct back *b, struct keel_span param)
{
    return keel_span_sub(b->grads, param.offset - b->adapter->params.offset, param.bytes);
}

// From dy, the gradient of a map's output: gradients of its adapter, and of its input x into dx (unless nothing). A bias passes
// gradients on as they are.
static void map_back(const struct back *b, const struct keel_matrix *w, const struct keel_lora *pair, struct keel_span h,
                     struct keel_span x, struct keel_span dy, struct keel_span dx, bool add, uint32_t n)
{
    keel_recorder *rec = b->t->rec;
    if (dx.bytes > 0) {
        keel_linear_bwd(rec, &(struct keel_linear_bwd_params){.w = w, .dy = dy, .dx = dx, .n_tokens = n, .add = add});
    }
    if (pair) {
        keel_lora_bwd_h(rec, pair, dy, b->t->g.dh, n);
        keel_lora_bwd_b(rec, pair, dy, h, grad_of(b, pair->b), n);
        keel_lora_bwd_a(rec, pair, b->t->g.dh, x, grad_of(b, pair->a), n);
        if (dx.bytes > 0) {
            keel_lora_bwd_x(rec, pair, b->t->g.dh, dx, n);
        }
    }
}

static void block_map_back(const struct back *b, uint32_t layer, enum keel_siglip_proj proj, struct keel_span x, struct keel_span dy,
                           struct keel_span dx, bool add, uint32_t n)
{
    map_back(b, &b->t->v->w.block[layer].w[proj], keel_vision_pair(b->adapter, layer, proj), b->t->acts.h[proj], x, dy, dx, add, n);
}

static void norm_back(const struct back *b, struct keel_span x, struct keel_span w, struct keel_span dy, struct keel_span dx, bool add)
{
    const struct keel_siglip *c = &b->t->v->cfg;
    keel_layernorm_bwd(b->t->rec, &(struct keel_layernorm_bwd_params){
                                      .x = x, .w = w, .dy = dy, .dx = dx, .n_rows = c->n_patches, .width = c->width, .eps = c->eps,
                                      .add = add});
}

// g.x += what comes back through the feed-forward half, of which only a->x1 and a->fn need be there.
static void ffn_back(const struct back *b, uint32_t layer)
{
    const struct keel_siglip *c = &b->t->v->cfg;
    const struct keel_tower_acts *a = &b->t->acts;
    const struct vision_grads *g = &b->t->g;
    for (uint32_t i = 0; i < c->n_patches; i += KEEL_FFN_ROWS) {
        const uint32_t m = KEEL_MIN(KEEL_FFN_ROWS, c->n_patches - i);
        const struct keel_span dy = keel_rows(g->x, i, m, c->width), fn = keel_rows(a->fn, i, m, c->width);
        const struct keel_lora *down = keel_vision_pair(b->adapter, layer, KEEL_V_DOWN);
        keel_tower_ffn_rows(b->pass, layer, i, m);
        if (down) {
            keel_lora_down(b->t->rec, down, a->act, a->h[KEEL_V_DOWN], m);
        }
        block_map_back(b, layer, KEEL_V_DOWN, a->act, dy, g->up, false, m);
        keel_gelu_bwd(b->t->rec, a->up, g->up, g->up, (uint64_t)m * c->ff_width);
        block_map_back(b, layer, KEEL_V_UP, fn, g->up, keel_rows(g->t, i, m, c->width), false, m);
    }
    norm_back(b, a->x1, b->t->v->w.block[layer].norm[KEEL_V_LN2], g->t, g->x, true);
}

// g.x: gradient of the block's output on entry, of its input on return. `lowest`: nothing below needs a gradient.
static void block_back(const struct back *b, uint32_t layer, bool lowest)
{
    const struct keel_siglip *c = &b->t->v->cfg;
    const struct keel_tower_acts *a = &b->t->acts;
    const struct vision_grads *g = &b->t->g;
    const struct keel_span dxn = lowest ? (struct keel_span){0} : g->t;
    const uint32_t n = c->n_patches;
    keel_tower_attention_half(b->pass, layer, b->t->saved[layer]);
    ffn_back(b, layer);
    block_map_back(b, layer, KEEL_V_OUT, a->o, g->x, g->d_o, false, n);
    keel_attention_bwd(b->t->rec, &(struct keel_attention_bwd_params){
                                      .q = a->q, .k = a->k, .v = a->v, .spans = a->spans, .p = a->p, .d_o = g->d_o, .dq = g->q,
                                      .dk = g->k, .dv = g->v, .ds = g->ds, .n_tokens = n, .n_heads = c->n_heads,
                                      .n_kv_heads = c->n_heads, .head_dim = c->head_dim, .max_span = n, .max_union = n,
                                      .max_q_union = n, .scale = keel_siglip_scale(c)});
    block_map_back(b, layer, KEEL_V_Q, a->xn, g->q, dxn, false, n);
    block_map_back(b, layer, KEEL_V_K, a->xn, g->k, dxn, true, n);
    block_map_back(b, layer, KEEL_V_V, a->xn, g->v, dxn, true, n);
    if (!lowest) {
        norm_back(b, b->t->saved[layer], b->t->v->w.block[layer].norm[KEEL_V_LN1], g->t, g->x, true);
    }
}

// From g.tokens to g.x, the gradient of the last block's output.
static void projector_back(const struct back *b)
{
    const struct keel_siglip *c = &b->t->v->cfg;
    const struct keel_siglip_weights *w = &b->t->v->w;
    const struct keel_tower_acts *a = &b->t->acts;
    const struct vision_grads *g = &b->t->g;
    map_back(b, &w->proj, keel_vision_pair(b->adapter, c->n_layers, 0), a->h[KEEL_V_N_PROJ], a->normed, g->tokens, g->pooled, false,
             c->n_tokens);
    keel_rmsnorm_bwd(b->t->rec, &(struct keel_rmsnorm_bwd_params){.x = a->pooled, .w = w->soft_norm, .dy = g->pooled, .dx = g->pooled,
                                                                  .n_rows = c->n_tokens, .width = c->width, .eps = c->eps});
    keel_pool_bwd(b->t->rec, &(struct keel_pool_params){
                                 .x = g->pooled, .y = g->t, .grid = c->grid, .kernel = c->kernel, .width = c->width});
    norm_back(b, a->x, w->post_norm, g->t, g->x, false);
}

static bool has_pairs(const keel_adapter *a, uint32_t layer)
{
    for (uint32_t i = 0; i < KEEL_V_N_PROJ; i++) {
        if (keel_vision_pair(a, layer, i)) {
            return true;
        }
    }
    return false;
}

keel_status keel_vision_trainer_backward(keel_vision_trainer *t, const keel_adapter *adapter, struct keel_span grads,
                                         struct keel_view view, const float *d_tokens)
{
    keel_status st = KEEL_OK;
    const struct keel_siglip *c = &t->v->cfg;
    const struct keel_tower_pass pass = pass_of(t, &adapter);
    const struct back b = {.t = t, .pass = &pass, .adapter = adapter, .grads = grads};
    uint32_t lowest = 0;
    KEEL_TRY(record_forward(t, &pass, view));
    KEEL_TRY(keel_upload(t->v->dev, t->g.tokens, d_tokens, (size_t)c->n_tokens * c->out_width * sizeof *d_tokens));
    while (lowest < c->n_layers && !has_pairs(adapter, lowest)) {
        lowest++;
    }
    projector_back(&b);
    for (uint32_t i = c->n_layers; i-- > lowest;) {
        block_back(&b, i, i == lowest);
    }
    KEEL_TRY(keel_recorder_submit(t->rec));
    KEEL_TRY(keel_recorder_wait(t->rec));
out:
    if (st != KEEL_OK) {
        keel_recorder_reset(t->rec);
    }
    return st;
}
