// SPDX-License-Identifier: MIT
// ops/rope.c: QK-norm with rotary embedding and the write into the key/value cache. Source: Su et al. 2021.
#include "ops_internal.h"

#include "rope/heads.h"

static_assert(sizeof(struct heads_pc) == 20, "shaders/rope/heads.h");

void keel_heads(keel_recorder *rec, const struct keel_heads_params *p)
{
    const bool norm = p->w.bytes != 0, slots = p->spans.bytes != 0;
    const uint64_t n = (uint64_t)p->n_tokens * p->n_heads * p->head_dim;
    const struct heads_pc pc = { .n_heads = p->n_heads, .head_dim = p->head_dim, .y_rows = KEEL_MAX(p->y_rows, 1u),
                                 .use_slot = slots, .eps = p->eps };
    // Bindings that a form does not read get x, so that all forms share one layout. y is only written in part: the cache
    // keeps its other rows, hence UPDATE.
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_heads_fwd, .spec = { LANES, norm }, .n_spec = 2,
        .bind = { READ(p->x), READ(norm ? p->w : p->x), READ(norm ? p->rope : p->x), READ(slots ? p->spans : p->x), UPDATE(p->y) },
        .n_bind = 5, .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_heads, p->n_tokens, 1 },
        .flops = norm ? 8 * n : n, .bytes = 8 * n, .label = norm ? "qk_norm_rope" : "cache_write" });
}

void keel_heads_bwd(keel_recorder *rec, const struct keel_heads_bwd_params *p)
{
    const uint64_t n = (uint64_t)p->n_tokens * p->n_heads * p->head_dim;
    const struct heads_pc pc = { .n_heads = p->n_heads, .head_dim = p->head_dim, .y_rows = 1, .eps = p->eps };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_heads_bwd, .spec = { LANES }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->w), READ(p->rope), READ(p->dy), UPDATE(p->dx) }, .n_bind = 5,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_heads, p->n_tokens, 1 },
        .flops = 16 * n, .bytes = 12 * n, .label = "qk_norm_rope_bwd" });
}
