// SPDX-License-Identifier: MIT
// gemma3/trainer.c: forward and backward over packed rows. Each block's input is kept; its inside is computed again on the way
// back (Chen et al. 2016, "Training deep nets with sublinear memory cost").
// Owns the buffers of a training pass. What lies above the blocks is trainer_loss.c's; the optimiser and the data are the train room's.
#include "trainer_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NORM(layer, t) ((layer)->norm[(t) - KEEL_N_PROJ])

// --- layout --------------------------------------------------------------------------------------

static void want_host(struct keel_layout *l, void *user)
{
    keel_trainer *t = user;
    keel_batch_layout(l, &t->batch, &t->model->cfg, t->max_tokens, t->max_loss, t->chunk);
}

static void want_saved(struct keel_layout *l, keel_trainer *t)
{
    const struct keel_gemma3 *c = &t->model->cfg;
    for (uint32_t i = 0; i < c->n_layers; i++) {
        struct keel_span dummy;
        keel_want(l, t->saved ? &t->saved[i] : &dummy, 4ull * t->max_tokens * c->width);
    }
}

static void want_grads(struct keel_layout *l, keel_trainer *t)
{
    const struct keel_gemma3 *c = &t->model->cfg;
    struct keel_trainer_grads *g = &t->g;
    const uint64_t row = 4ull * t->max_tokens;
    keel_want(l, &g->x, row * c->width);
    keel_want(l, &g->t, row * c->width);
    keel_want(l, &g->f, row * c->ff_width);
    keel_want(l, &g->d_o, row * keel_q_width(c));
    keel_want(l, &g->dq, row * keel_q_width(c));
    keel_want(l, &g->dk, row * keel_kv_width(c));
    keel_want(l, &g->dv, row * keel_kv_width(c));
    keel_want(l, &g->ds, row * c->n_heads * t->max_row);
}

static void want_loss(struct keel_layout *l, keel_trainer *t)
{
    const struct keel_gemma3 *c = &t->model->cfg;
    keel_want(l, &t->rows, 4ull * t->max_loss * c->width);
    keel_want(l, &t->normed, 4ull * t->max_loss * c->width);
    keel_want(l, &t->logits, 4ull * t->chunk * c->vocab);
    keel_want(l, &t->partial, keel_xent_scratch(t->chunk, c->vocab));
}

static void want_device(struct keel_layout *l, void *user)
{
    keel_trainer *t = user;
    want_saved(l, t);
    keel_acts_layout(l, &t->acts, &t->model->cfg, t->max_tokens, t->max_row, true, UINT64_MAX);
    want_grads(l, t);
    want_loss(l, t);
}

static void want_lora(struct keel_layout *l, void *user)
{
    keel_trainer *t = user;
    keel_lora_layout(l, &t->acts, t->max_tokens, t->rank);
    keel_want(l, &t->g.dh, 4ull * t->max_tokens * t->rank);
}

void keel_trainer_plan(const keel_model *model, uint32_t tokens, uint32_t max_row, uint32_t rank, struct keel_plan *out,
                       void (*row)(struct keel_plan *p, const char *what, uint64_t bytes, bool host))
{
    keel_trainer t = { .model = (keel_model *)(uintptr_t)model, .max_tokens = tokens, .max_row = max_row, .max_loss = tokens,
                       .rank = rank };
    struct keel_layout saved = { 0 }, acts = { 0 }, grads = { 0 }, loss = { 0 }, lora = { 0 }, host = { 0 };
    t.chunk = keel_logit_rows(&model->cfg, KEEL_MIN(64u, tokens), UINT64_C(128) << 20);
    t.batch.c = &model->cfg;
    want_saved(&saved, &t);
    keel_acts_layout(&acts, &t.acts, &model->cfg, tokens, max_row, true, UINT64_MAX);
    want_grads(&grads, &t);
    want_loss(&loss, &t);
    want_lora(&lora, &t);
    want_host(&host, &t);
    row(out, "saved block inputs", saved.bytes, false);
    row(out, "activations of a block", acts.bytes + lora.bytes, false);
    row(out, "gradients of a block", grads.bytes, false);
    row(out, "logits and loss rows", loss.bytes, false);
    row(out, "training batch", host.bytes, false);
}

keel_status keel_trainer_create(keel_trainer **out, keel_model *model, uint32_t max_tokens, uint32_t max_row, uint32_t max_loss)
{
    keel_status st = KEEL_OK;
    keel_trainer *t = calloc(1, sizeof *t);
    const struct keel_gemma3 *c = &model->cfg;
    *out = NULL;
    if (!t || !(t->saved = calloc(c->n_layers, sizeof *t->saved))) {
        KEEL_FAIL(model->log, KEEL_ERR_NO_MEMORY, "no memory for a training pass");
    }
    KEEL_ASSERT(model->dev && max_tokens > 0 && max_row > 0 && max_loss > 0);
    const uint64_t range = keel_device_caps(model->dev)->max_range;
    t->model = model;
    t->max_tokens = max_tokens;
    t->max_row = max_row;
    t->max_loss = max_loss;
    t->chunk = keel_logit_rows(c, KEEL_MIN(64u, max_loss), range);
    const uint64_t p_bytes = 4ull * c->n_heads * max_tokens * max_row;
    if (p_bytes > range || 4ull * max_tokens * c->ff_width > range) {
        KEEL_FAIL(model->log, KEEL_ERR_UNSUPPORTED,
                  "micro-batches of %u tokens with rows of up to %u need a binding of %.0f MB, this device takes %.0f MB; lower "
                  "--batch (and raise --accum) or shorten the rows",
                  max_tokens, max_row, (double)KEEL_MAX(p_bytes, 4ull * max_tokens * c->ff_width) / 1e6, (double)range / 1e6);
    }
    KEEL_TRY(keel_batch_init(&t->batch, c, model->log));
    KEEL_TRY(keel_layout_make(&t->host, model->dev, KEEL_HEAP_HOST, "training batch", want_host, t));
    KEEL_TRY(keel_layout_make(&t->heap, model->dev, KEEL_HEAP_DEVICE, "training", want_device, t));
    KEEL_TRY(keel_recorder_create(&t->rec, model->dev, NULL));
    *out = t;
    t = NULL;
out:
    keel_trainer_destroy(&t);
    return st;
}

void keel_trainer_destroy(keel_trainer **trainer)
{
    keel_trainer *t = trainer ? *trainer : NULL;
    if (!t) {
        return;
    }
    keel_recorder_destroy(&t->rec);
    keel_heap_destroy(&t->top.heap);
    keel_heap_destroy(&t->constrain.heap);
    keel_heap_destroy(&t->lora);
    keel_heap_destroy(&t->heap);
    keel_heap_destroy(&t->host);
    keel_batch_finish(&t->batch);
    free(t->saved);
    free(t);
    *trainer = NULL;
}

// --- backward ------------------------------------------------------------------------------------

struct back {
    keel_trainer *t;
    const keel_adapter *adapter;
    struct keel_span grads; // like adapter->params
    uint32_t n;             // tokens
    const struct keel_pass *pass;
};

static struct keel_span grad_of(const struct back *b, struct keel_span param)
{
    return keel_span_sub(b->grads, param.offset - b->adapter->params.offset, param.bytes);
}

// From dy, the gradient of a projection's output: gradients of its adapter, and of its input x into dx (unless nothing).
static void project_back(const struct back *b, uint32_t layer, enum keel_proj proj, struct keel_span x, struct keel_span dy,
                         struct keel_span dx, bool add)
{
    keel_recorder *rec = b->t->rec;
    const struct keel_lora *pair = &b->adapter->pair[(size_t)layer * KEEL_N_PROJ + proj];
    if (dx.bytes > 0) {
        keel_linear_bwd(rec, &(struct keel_linear_bwd_params){
            .w = &b->t->model->w.block[layer].proj[proj], .dy = dy, .dx = dx, .n_tokens = b->n, .add = add });
    }
    if (pair->rank > 0) {
        keel_lora_bwd_h(rec, pair, dy, b->t->g.dh, b->n);
        keel_lora_bwd_b(rec, pair, dy, b->t->acts.h[proj], grad_of(b, pair->b), b->n);
        keel_lora_bwd_a(rec, pair, b->t->g.dh, x, grad_of(b, pair->a), b->n);
        if (dx.bytes > 0) {
            keel_lora_bwd_x(rec, pair, b->t->g.dh, dx, b->n);
        }
    }
    for (uint32_t i = 0; i < b->t->n_frozen && dx.bytes > 0; i++) {
        const struct keel_lora *fixed = &b->t->adapters[i]->pair[(size_t)layer * KEEL_N_PROJ + proj];
        if (fixed->rank > 0) {
            keel_lora_bwd_h(rec, fixed, dy, b->t->g.dh, b->n);
            keel_lora_bwd_x(rec, fixed, b->t->g.dh, dx, b->n);
        }
    }
}

static void norm_back(const struct back *b, struct keel_span x, struct keel_span w, struct keel_span dy, struct keel_span dx,
                      bool add)
{
    keel_rmsnorm_bwd(b->t->rec, &(struct keel_rmsnorm_bwd_params){ .x = x, .w = w, .dy = dy, .dx = dx, .n_rows = b->n,
                                                                   .width = b->t->model->cfg.width,
                                                                   .eps = b->t->model->cfg.eps, .add = add });
}

static void heads_back(const struct back *b, uint32_t kind, uint32_t n_heads, struct keel_span x, struct keel_span w,
                       struct keel_span d)
{
    keel_heads_bwd(b->t->rec, &(struct keel_heads_bwd_params){
        .x = x, .w = w, .rope = b->t->batch.rope[kind], .dy = d, .dx = d, .n_tokens = b->n, .n_heads = n_heads,
        .head_dim = b->t->model->cfg.head_dim, .eps = b->t->model->cfg.eps });
}

// Gradient of a branch's output before its norm, into g.t, from that of the residual stream.
static void branch_back(const struct back *b, uint32_t layer, enum keel_site site, struct keel_span x, struct keel_span w)
{
    const struct keel_trainer_grads *g = &b->t->g;
    if (keel_pass_hooked(b->pass, site, layer)) {
        const uint64_t bytes = 4ull * b->n * b->t->model->cfg.width;
        keel_record_copy(b->t->rec, keel_span_sub(g->t, 0, bytes), keel_span_sub(g->x, 0, bytes));
        keel_pass_hooks_back(b->pass, site, layer, g->t);
        norm_back(b, x, w, g->t, g->t, false);
    } else {
        norm_back(b, x, w, g->x, g->t, false);
    }
}

// g.x: gradient of the block's output on entry, of its input on return. The block's acts are those of its recomputation.
// `lowest`: nothing below needs a gradient.
static void block_back(const struct back *b, uint32_t layer, bool lowest)
{
    const struct keel_gemma3 *c = &b->t->model->cfg;
    const struct keel_gemma3_block *w = &b->t->model->w.block[layer];
    const struct keel_acts *a = &b->t->acts;
    const struct keel_trainer_grads *g = &b->t->g;
    const struct keel_batch_group *group = &b->t->batch.group[0];
    const uint32_t kind = c->kind[layer];
    const struct keel_span nothing = { 0 };
    keel_pass_hooks_back(b->pass, KEEL_SITE_POST, layer, g->x);
    branch_back(b, layer, KEEL_SITE_MLP, a->down, NORM(w, KEEL_T_POST_FFW_NORM));
    project_back(b, layer, KEEL_FFN_DOWN, a->act, g->t, g->f, false);
    keel_geglu_bwd(b->t->rec, &(struct keel_geglu_bwd_params){ .gate = a->gate, .up = a->up, .dy = g->f, .d_gate = a->gate,
                                                               .d_up = a->up, .n = (uint64_t)b->n * c->ff_width });
    project_back(b, layer, KEEL_FFN_GATE, a->fn, a->gate, g->t, false);
    project_back(b, layer, KEEL_FFN_UP, a->fn, a->up, g->t, true);
    norm_back(b, a->x1, NORM(w, KEEL_T_FFN_NORM), g->t, g->x, true);

    branch_back(b, layer, KEEL_SITE_ATTN, a->ao, NORM(w, KEEL_T_POST_ATTN_NORM));
    project_back(b, layer, KEEL_ATTN_OUTPUT, a->o, g->t, g->d_o, false);
    keel_attention_bwd(b->t->rec, &(struct keel_attention_bwd_params){
        .q = a->qr, .k = a->kr, .v = a->v, .spans = b->t->batch.spans[kind], .p = a->p, .d_o = g->d_o, .dq = g->dq, .dk = g->dk,
        .dv = g->dv, .ds = g->ds, .n_tokens = b->n, .n_heads = c->n_heads, .n_kv_heads = c->n_kv_heads, .head_dim = c->head_dim,
        .max_span = group->max_span[kind], .max_union = group->max_union[kind], .max_q_union = group->max_q_union[kind],
        .scale = c->attn_scale });
    heads_back(b, kind, c->n_heads, a->q, NORM(w, KEEL_T_Q_NORM), g->dq);
    heads_back(b, kind, c->n_kv_heads, a->k, NORM(w, KEEL_T_K_NORM), g->dk);
    const struct keel_span dxn = lowest ? nothing : g->t;
    project_back(b, layer, KEEL_ATTN_Q, a->xn, g->dq, dxn, false);
    project_back(b, layer, KEEL_ATTN_K, a->xn, g->dk, dxn, true);
    project_back(b, layer, KEEL_ATTN_V, a->xn, g->dv, dxn, true);
    if (!lowest) {
        norm_back(b, b->t->saved[layer], NORM(w, KEEL_T_ATTN_NORM), g->t, g->x, true);
        keel_pass_hooks_back(b->pass, KEEL_SITE_PRE, layer, g->x);
    }
}

// --- one step ------------------------------------------------------------------------------------

static keel_status fill_batch(keel_trainer *t, const struct keel_seq *seqs, size_t n_seqs)
{
    keel_status st = KEEL_OK;
    keel_batch_clear(&t->batch);
    for (size_t s = 0; s < n_seqs; s++) {
        const struct keel_batch_row row = { .ids = seqs[s].ids, .n = seqs[s].n, .images = seqs[s].images,
                                            .n_images = seqs[s].n_images, .prompt = seqs[s].first, .mask = seqs[s].mask,
                                            .number = (uint32_t)s };
        uint32_t first;
        KEEL_ASSERT(seqs[s].n <= t->max_row && seqs[s].first >= 1);
        if (row.n_images > 0) {
            KEEL_TRY(keel_batch_make_image_room(&t->batch, t->model->dev));
        }
        KEEL_TRY(keel_batch_add(&t->batch, &row, &first));
        for (uint32_t i = seqs[s].first; i < seqs[s].n; i++) {
            if (!seqs[s].mask || seqs[s].mask[i]) {
                keel_batch_place(&t->batch, first + i - 1, seqs[s].ids[i], seqs[s].weight);
            }
        }
    }
    keel_batch_ready(&t->batch, t->model->dev);
out:
    return st;
}

static bool has_pairs(const keel_adapter *a, uint32_t layer)
{
    for (uint32_t i = 0; i < KEEL_N_PROJ; i++) {
        if (a->pair[(size_t)layer * KEEL_N_PROJ + i].rank > 0) {
            return true;
        }
    }
    return false;
}

static uint32_t widest(const keel_trainer *t)
{
    uint32_t rank = 1;
    for (uint32_t k = 0; k <= t->n_frozen; k++) {
        const keel_adapter *a = t->adapters[k];
        for (size_t i = 0; i < (size_t)a->n_layers * KEEL_N_PROJ; i++) {
            rank = KEEL_MAX(rank, a->pair[i].rank);
        }
    }
    return rank;
}

keel_status keel_trainer_forward(keel_trainer *t, const keel_adapter *adapter, const struct keel_seq *seqs, size_t n_seqs, bool hooked,
                                 struct keel_pass *pass)
{
    keel_status st = KEEL_OK;
    const uint32_t n_layers = t->model->cfg.n_layers;
    t->adapters[t->n_frozen] = adapter; // last: the backward pass wants what its lower half wrote
    if (adapter && widest(t) != t->rank) {
        keel_heap_destroy(&t->lora);
        t->rank = widest(t);
        KEEL_TRY(keel_layout_make(&t->lora, t->model->dev, KEEL_HEAP_DEVICE, "LoRA activations", want_lora, t));
    }
    KEEL_TRY(fill_batch(t, seqs, n_seqs));
    *pass = (struct keel_pass){ .rec = t->rec, .model = t->model, .batch = &t->batch, .acts = &t->acts, .adapters = t->adapters,
                                .n_adapters = adapter ? t->n_frozen + 1 : 0, .hooks = hooked ? t->hooks : NULL };
    if (t->batch.n_places == 0) {
        goto out;
    }
    keel_pass_embed(pass);
    keel_record_copy(t->rec, keel_span_sub(t->saved[0], 0, 4ull * t->batch.n_tokens * t->model->cfg.width),
                     keel_span_sub(t->acts.x, 0, 4ull * t->batch.n_tokens * t->model->cfg.width));
    for (uint32_t i = 0; i < n_layers; i++) {
        keel_pass_block(pass, i, t->saved[i], i + 1 < n_layers ? t->saved[i + 1] : t->acts.x);
    }
out:
    return st;
}

void keel_trainer_backward(keel_trainer *t, const struct keel_pass *pass, struct keel_span grads)
{
    const uint32_t n_layers = t->model->cfg.n_layers;
    const keel_adapter *adapter = t->adapters[t->n_frozen];
    const struct back back = { .t = t, .adapter = adapter, .grads = grads, .n = t->batch.n_tokens, .pass = pass };
    uint32_t lowest = 0;
    while (!t->input_grads && lowest < n_layers && !has_pairs(adapter, lowest)) {
        lowest++;
    }
    for (uint32_t i = n_layers; i-- > lowest;) {
        if (i + 1 < n_layers) { // the last block's insides are still there
            keel_pass_block(pass, i, t->saved[i], (struct keel_span){ 0 });
        }
        block_back(&back, i, i == lowest && !t->input_grads);
    }
}

keel_status keel_trainer_set_hooks(keel_trainer *t, const keel_hooks *hooks)
{
    const keel_status st = keel_batch_set_hooks(&t->batch, hooks);
    t->hooks = st == KEEL_OK && hooks && keel_hooks_count(hooks) > 0 ? hooks : NULL;
    return st;
}

void keel_trainer_set_step(keel_trainer *t, uint64_t done)
{
    t->batch.step = done;
}

void keel_trainer_set_frozen(keel_trainer *t, keel_adapter *const *adapters, uint32_t n)
{
    KEEL_ASSERT(n <= KEEL_MAX_FROZEN);
    t->n_frozen = n;
    for (uint32_t i = 0; i < n; i++) {
        t->adapters[i] = adapters[i];
    }
}

void keel_trainer_want_input_grads(keel_trainer *t, bool on)
{
    t->input_grads = on;
}

struct keel_span keel_trainer_input_grads(const keel_trainer *t)
{
    return keel_span_sub(t->g.x, 0, 4ull * t->batch.n_tokens * t->model->cfg.width);
}
