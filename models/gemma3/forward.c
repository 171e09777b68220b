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

// What adapter `i` adds to projection `proj`, or NULL.
static const struct keel_lora *pair_of(const struct keel_pass *p, uint32_t i, uint32_t layer, uint32_t proj)
{
    const struct keel_lora *pair = i < p->n_adapters ? &p->adapters[i]->pair[(size_t)layer * KEEL_N_PROJ + proj] : NULL;
    return pair && pair->rank > 0 ? pair : NULL;
}

// h = A x of one adapter for the projections from `first` on.
static void project_down(const struct keel_pass *p, uint32_t i, uint32_t layer, enum keel_proj first, uint32_t n, struct keel_span x)
{
    const struct keel_lora *pair[KEEL_MAX_LINEAR_PARTS];
    struct keel_span h[KEEL_MAX_LINEAR_PARTS];
    uint32_t m = 0;
    for (uint32_t j = 0; j < n; j++) {
        const struct keel_lora *l = pair_of(p, i, layer, first + j);
        if (l) {
            pair[m] = l;
            h[m++] = p->acts->h[first + j];
        }
    }
    if (m > 0) {
        keel_lora_down_group(p->rec, pair, m, x, h, p->batch->n_tokens);
    }
}

// y[j] = W x plus what every active adapter adds, for the `n` projections from `first` on. The one place where projections are
// computed. With `glu` they are gate and up, and y[0] = gelu(gate) · up.
static void project(const struct keel_pass *p, uint32_t layer, enum keel_proj first, uint32_t n, struct keel_span x,
                    const struct keel_span *y, bool glu)
{
    const bool stacked = p->n_adapters > 1; // all but the first adapter are added apart, before gelu
    struct keel_linear_group_params g = {.n_parts = n, .x = x, .n_tokens = p->batch->n_tokens, .glu = glu && !stacked};
    for (uint32_t j = 0; j < n; j++) {
        g.part[j] = (struct keel_linear_part){.w = &p->model->w.block[layer].proj[first + j],
                                              .y = y[j],
                                              .lora = pair_of(p, 0, layer, first + j),
                                              .h = p->acts->h[first + j]};
    }
    project_down(p, 0, layer, first, n, x);
    keel_linear_group(p->rec, &g);
    for (uint32_t i = 1; i < p->n_adapters; i++) {
        project_down(p, i, layer, first, n, x);
        for (uint32_t j = 0; j < n; j++) {
            const struct keel_lora *pair = pair_of(p, i, layer, first + j);
            if (pair) {
                keel_lora_up(p->rec, pair, p->acts->h[first + j], y[j], p->batch->n_tokens);
            }
        }
    }
    if (glu && stacked) {
        keel_geglu(p->rec, y[0], y[1], y[0], (uint64_t)p->batch->n_tokens * p->model->cfg.ff_width);
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
        h.part[1].type = p->kv->type;
        h.part[h.n_parts++] = (struct keel_heads_part){
            .x = a->v, .y = p->kv->v[layer], .n_heads = c->n_kv_heads, .y_rows = p->kv->rows[kind], .type = p->kv->type};
    }
    keel_heads(p->rec, &h);
}

void keel_pass_attention(const struct keel_pass *p, uint32_t layer, const struct keel_batch_group *g)
{
    const struct keel_gemma3 *c = &p->model->cfg;
    const struct keel_acts *a = p->acts;
    const uint32_t kind = c->kind[layer];
    struct keel_attention_params at = {
        .q = a->qr,
        .o = a->o,
        .spans = p->batch->spans[kind],
        .p = a->p,
        .first = g->t0,
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
        at.type = p->kv->type;
    } else {
        KEEL_ASSERT(g->t0 == 0); // only cached sequences stand in groups of their own
        at.k = a->kr;
        at.v = a->v;
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
    project(p, layer, KEEL_ATTN_Q, 3, a->xn, (struct keel_span[]){a->q, a->k, a->v}, false);
    heads(p, layer);
    for (uint32_t g = 0; g < p->batch->n_groups; g++) {
        keel_pass_attention(p, layer, &p->batch->group[g]);
    }
    project(p, layer, KEEL_ATTN_OUTPUT, 1, a->o, &a->ao, false);
    add_branch(p, layer, KEEL_SITE_ATTN,
               &(struct branch_end){a->ao, NORM(b, KEEL_T_POST_ATTN_NORM), x, a->x1, NORM(b, KEEL_T_FFN_NORM), a->fn});
    const bool in_place = a->act.block == a->gate.block && a->act.offset == a->gate.offset; // else the backward pass needs gate and up
    project(p, layer, KEEL_FFN_GATE, 2, a->fn, (struct keel_span[]){a->gate, a->up}, in_place);
    if (!in_place) {
        keel_geglu(p->rec, a->gate, a->up, a->act, (uint64_t)p->batch->n_tokens * c->ff_width);
    }
    project(p, layer, KEEL_FFN_DOWN, 1, a->act, &a->down, false);
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
