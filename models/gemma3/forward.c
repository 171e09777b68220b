// SPDX-License-Identifier: MIT
// gemma3/forward.c: the forward pass of a Gemma 3 text model over a batch.
// Owns the order of ops and the layout of activations. Source: transformers' Gemma3DecoderLayer; docs/gemma3.md.
#include "gemma3.h"

#include <string.h>

#define NORM(layer, t) ((layer)->norm[(t) - KEEL_N_PROJ])

// --- layout --------------------------------------------------------------------------------------

void keel_acts_layout(struct keel_layout *l, struct keel_acts *a, const struct keel_gemma3 *c, uint32_t cap, uint32_t max_span,
                      bool keep, uint64_t max_range)
{
    const uint64_t row = (uint64_t)cap * 4;
    a->cap = cap;
    keel_want(l, &a->x, row * c->width);
    keel_want(l, &a->xn, row * c->width);
    keel_want(l, &a->q, row * keel_q_width(c));
    keel_want(l, &a->k, row * keel_kv_width(c));
    keel_want(l, &a->v, row * keel_kv_width(c));
    keel_want(l, &a->qr, row * keel_q_width(c));
    keel_want(l, &a->kr, row * keel_kv_width(c));
    keel_want(l, &a->o, row * keel_q_width(c));
    keel_want(l, &a->ao, row * c->width);
    keel_want(l, &a->gate, row * c->ff_width);
    keel_want(l, &a->up, row * c->ff_width);
    if (keep) {
        keel_want(l, &a->x1, row * c->width);
        keel_want(l, &a->fn, row * c->width);
        keel_want(l, &a->act, row * c->ff_width);
        keel_want(l, &a->down, row * c->width);
        const uint64_t all = 4ull * c->n_heads * cap * max_span; // the backward pass needs the whole of a group
        keel_want(l, &a->p, KEEL_MIN(all, max_range));
    } else {
        a->x1 = a->x;
        a->fn = a->xn;
        a->act = a->gate;
        a->down = a->ao;
        keel_want(l, &a->p, KEEL_MIN(keel_attention_scratch(cap, c->n_heads, max_span), max_range));
    }
}

void keel_lora_layout(struct keel_layout *l, struct keel_acts *a, uint32_t cap, uint32_t rank)
{
    for (uint32_t i = 0; i < KEEL_N_PROJ; i++) {
        keel_want(l, &a->h[i], (uint64_t)cap * rank * 4);
    }
}

// --- parts ---------------------------------------------------------------------------------------

// y = W x plus what every active adapter adds. The one place where a projection is computed.
static void project(const struct keel_pass *p, uint32_t layer, enum keel_proj proj, struct keel_span x, struct keel_span y)
{
    const uint32_t n = p->batch->n_tokens;
    keel_linear(p->rec, &(struct keel_linear_params){
                            .w = &p->model->w.block[layer].proj[proj], .x = x, .y = y, .n_tokens = n});
    for (uint32_t i = 0; i < p->n_adapters; i++) {
        const struct keel_lora *pair = &p->adapters[i]->pair[(size_t)layer * KEEL_N_PROJ + proj];
        if (pair->rank > 0) {
            keel_lora_down(p->rec, pair, x, p->acts->h[proj], n);
            keel_lora_up(p->rec, pair, p->acts->h[proj], y, n);
        }
    }
}

static void norm(const struct keel_pass *p, struct keel_span x, struct keel_span w, struct keel_span residual, struct keel_span y)
{
    keel_rmsnorm(p->rec, &(struct keel_rmsnorm_params){.x = x,
                                                       .w = w,
                                                       .y = y,
                                                       .residual = residual,
                                                       .n_rows = p->batch->n_tokens,
                                                       .width = p->model->cfg.width,
                                                       .eps = p->model->cfg.eps});
}

// QK-norm and rotation of the queries in place of the batch, keys and values into the cache if there is one.
static void heads(const struct keel_pass *p, uint32_t layer)
{
    const struct keel_gemma3 *c = &p->model->cfg;
    const struct keel_gemma3_block *b = &p->model->w.block[layer];
    const struct keel_acts *a = p->acts;
    const uint32_t kind = c->kind[layer];
    struct keel_heads_params h = {
        .part = {{.x = a->q, .w = NORM(b, KEEL_T_Q_NORM), .y = a->qr, .n_heads = c->n_heads},
                 {.x = a->k, .w = NORM(b, KEEL_T_K_NORM), .y = a->kr, .n_heads = c->n_kv_heads}},
        .n_parts = 2,
        .rope = p->batch->rope[kind],
        .spans = p->batch->spans[kind],
        .n_tokens = p->batch->n_tokens,
        .head_dim = c->head_dim,
        .eps = c->eps,
    };
    if (p->kv) {
        h.part[1].y = p->kv->k[layer];
        h.part[1].y_rows = p->kv->rows[kind];
        h.part[h.n_parts++] = (struct keel_heads_part){
            .x = a->v, .y = p->kv->v[layer], .n_heads = c->n_kv_heads, .y_rows = p->kv->rows[kind]};
    }
    keel_heads(p->rec, &h);
}

static struct keel_span rows_of(struct keel_span s, uint32_t t0, uint32_t n, uint32_t row_bytes)
{
    return keel_span_sub(s, (uint64_t)t0 * row_bytes, (uint64_t)n * row_bytes);
}

void keel_pass_attention(const struct keel_pass *p, uint32_t layer, const struct keel_batch_group *g)
{
    const struct keel_gemma3 *c = &p->model->cfg;
    const struct keel_acts *a = p->acts;
    const uint32_t kind = c->kind[layer], q_row = keel_q_width(c) * 4, kv_row = keel_kv_width(c) * 4;
    struct keel_attention_params at = {
        .q = rows_of(a->qr, g->t0, g->n, q_row),
        .o = rows_of(a->o, g->t0, g->n, q_row),
        .spans = rows_of(p->batch->spans[kind], g->t0, g->n, sizeof(struct keel_token_span)),
        .p = a->p,
        .n_tokens = g->n,
        .n_heads = c->n_heads,
        .n_kv_heads = c->n_kv_heads,
        .head_dim = c->head_dim,
        .max_span = g->max_span[kind],
        .max_union = g->max_union[kind],
        .scale = c->attn_scale,
    };
    if (p->bucket > 0) {
        at.max_span = kind == KEEL_LOCAL ? KEEL_MIN(p->bucket, c->window) : p->bucket;
        at.max_union = at.max_span + (KEEL_ATTENTION_GROUP - 1) * p->seq_rows;
    }
    if (p->kv) {
        at.k = p->kv->k[layer];
        at.v = p->kv->v[layer];
        at.kv_rows = p->kv->rows[kind];
    } else {
        at.k = rows_of(a->kr, g->t0, g->n, kv_row);
        at.v = rows_of(a->v, g->t0, g->n, kv_row);
        at.kv_rows = g->n;
    }
    keel_attention(p->rec, &at);
}

// --- the pass ------------------------------------------------------------------------------------

void keel_pass_embed(const struct keel_pass *p)
{
    keel_embed(p->rec, &(struct keel_embed_params){.w = &p->model->w.embd,
                                                   .ids = p->batch->ids,
                                                   .y = p->acts->x,
                                                   .n_tokens = p->batch->n_tokens,
                                                   .scale = p->model->cfg.embed_scale});
    if (p->batch->n_image_tokens > 0) {
        keel_scatter_rows(p->rec, p->batch->image_rows, p->batch->image_place, p->acts->x, p->batch->n_image_tokens,
                          p->model->cfg.width);
    }
}

// What a branch of the block adds: y = residual + norm(x) · w; then, unless next_w is nothing, next = norm(y) · next_w for the
// branch after it.
struct branch_end {
    struct keel_span x, w, residual, y, next_w, next;
};

// Hooks on what a branch adds need it alone first.
static void add_hooked_branch(const struct keel_pass *p, uint32_t layer, enum keel_site site, const struct branch_end *e)
{
    const bool in_place = e->y.block == e->residual.block && e->y.offset == e->residual.offset;
    const struct keel_span branch = in_place ? e->x : e->y; // with a y of its own x stays for the backward pass
    norm(p, e->x, e->w, (struct keel_span){0}, branch);
    keel_pass_hooks(p, site, layer, branch);
    keel_axpy(p->rec, 1.0f, in_place ? branch : e->residual, e->y, (uint64_t)p->batch->n_tokens * p->model->cfg.width);
    if (e->next_w.bytes > 0) {
        norm(p, e->y, e->next_w, (struct keel_span){0}, e->next);
    }
}

static void add_branch(const struct keel_pass *p, uint32_t layer, enum keel_site site, const struct branch_end *e)
{
    if (keel_pass_hooked(p, site, layer)) {
        add_hooked_branch(p, layer, site, e);
    } else if (e->next_w.bytes > 0) {
        keel_rmsnorm_pair(p->rec, &(struct keel_rmsnorm_pair_params){.x = e->x,
                                                                     .w = e->w,
                                                                     .residual = e->residual,
                                                                     .y = e->y,
                                                                     .v = e->next_w,
                                                                     .z = e->next,
                                                                     .n_rows = p->batch->n_tokens,
                                                                     .width = p->model->cfg.width,
                                                                     .eps = p->model->cfg.eps});
    } else {
        norm(p, e->x, e->w, e->residual, e->y);
    }
}

// Whether the norm that block `layer` begins with may be taken where the block before it ends: no hook stands between.
static bool joins_previous(const struct keel_pass *p, uint32_t layer)
{
    return layer > 0 && !keel_pass_hooked(p, KEEL_SITE_POST, layer - 1) && !keel_pass_hooked(p, KEEL_SITE_PRE, layer);
}

// A block; `normed`: acts->xn holds its first norm already; `next_w`: the first norm of the next block, or nothing.
static void pass_block(const struct keel_pass *p, uint32_t layer, struct keel_span x, struct keel_span y, bool normed,
                       struct keel_span next_w)
{
    const struct keel_gemma3 *c = &p->model->cfg;
    const struct keel_gemma3_block *b = &p->model->w.block[layer];
    const struct keel_acts *a = p->acts;
    if (y.bytes > 0) {
        keel_pass_hooks(p, KEEL_SITE_PRE, layer, x);
    }
    if (!normed) {
        norm(p, x, NORM(b, KEEL_T_ATTN_NORM), (struct keel_span){0}, a->xn);
    }
    project(p, layer, KEEL_ATTN_Q, a->xn, a->q);
    project(p, layer, KEEL_ATTN_K, a->xn, a->k);
    project(p, layer, KEEL_ATTN_V, a->xn, a->v);
    heads(p, layer);
    for (uint32_t g = 0; g < p->batch->n_groups; g++) {
        keel_pass_attention(p, layer, &p->batch->group[g]);
    }
    project(p, layer, KEEL_ATTN_OUTPUT, a->o, a->ao);
    add_branch(p, layer, KEEL_SITE_ATTN,
               &(struct branch_end){a->ao, NORM(b, KEEL_T_POST_ATTN_NORM), x, a->x1, NORM(b, KEEL_T_FFN_NORM), a->fn});
    project(p, layer, KEEL_FFN_GATE, a->fn, a->gate);
    project(p, layer, KEEL_FFN_UP, a->fn, a->up);
    keel_geglu(p->rec, a->gate, a->up, a->act, (uint64_t)p->batch->n_tokens * c->ff_width);
    project(p, layer, KEEL_FFN_DOWN, a->act, a->down);
    if (y.bytes > 0) {
        add_branch(p, layer, KEEL_SITE_MLP,
                   &(struct branch_end){a->down, NORM(b, KEEL_T_POST_FFW_NORM), a->x1, y, next_w, a->xn});
        keel_pass_hooks(p, KEEL_SITE_POST, layer, y);
    }
}

void keel_pass_block(const struct keel_pass *p, uint32_t layer, struct keel_span x, struct keel_span y)
{
    pass_block(p, layer, x, y, false, (struct keel_span){0});
}

void keel_pass_blocks(const struct keel_pass *p)
{
    const uint32_t n = p->model->cfg.n_layers;
    for (uint32_t i = 0; i < n; i++) {
        const bool joins_next = i + 1 < n && joins_previous(p, i + 1);
        pass_block(p, i, p->acts->x, p->acts->x, joins_previous(p, i),
                   joins_next ? NORM(&p->model->w.block[i + 1], KEEL_T_ATTN_NORM) : (struct keel_span){0});
    }
}

void keel_pass_head(const struct keel_pass *p, struct keel_span rows, struct keel_span logits, uint32_t n)
{
    keel_linear(p->rec, &(struct keel_linear_params){.w = p->model->w.head, .x = rows, .y = logits, .n_tokens = n});
}
