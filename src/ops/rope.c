// SPDX-License-Identifier: MIT
// ops/rope.c: QK-norm with rotary embedding and the write into the key/value cache. Source: Su et al. 2021.
#include "ops_internal.h"

#include "rope/heads.h"

static_assert(sizeof(struct heads_pc) == 80 && sizeof(struct heads_bwd_pc) == 12, "shaders/rope/heads.h");

#define PARTS KEEL_MAX_HEADS_PARTS

uint64_t keel_kv_head_bytes(enum keel_dtype type, uint32_t head_dim)
{
    const uint64_t blocks = keel_div_up(head_dim, 32);
    switch (type) {
    case KEEL_F16: return 2 * keel_align_up(head_dim, 8);
    case KEEL_Q8_0: return 4 * keel_align_up(9 * blocks, 4);
    default: return 4ull * head_dim;
    }
}

// The parts [first, first + n) in one dispatch; x and w hold what all of them read.
static void record_heads(keel_recorder *rec, const struct keel_heads_params *p, uint32_t first, uint32_t n, struct keel_span x,
                         struct keel_span w)
{
    struct heads_pc pc = { .head_dim = p->head_dim, .eps = p->eps };
    struct keel_span y[PARTS];
    uint32_t heads = 0, normed = 0;
    bool slots = false;
    enum keel_dtype type = KEEL_F32;
    for (uint32_t i = 0; i < n; i++) {
        const struct keel_heads_part *part = &p->part[first + i];
        const bool norm = part->w.bytes != 0;
        pc.part[i] = (struct heads_part){ .n_heads = part->n_heads, .x = span_words(x, part->x),
                                          .w = norm ? span_words(w, part->w) : 0, .y_rows = part->y_rows, .norm = norm,
                                          .packed = part->type != KEEL_F32 };
        assert(type == KEEL_F32 || part->type == KEEL_F32 || part->type == type);
        type = part->type == KEEL_F32 ? type : part->type;
        y[i] = part->y;
        heads += part->n_heads;
        normed += norm ? part->n_heads : 0;
        slots = slots || part->y_rows > 0;
    }
    for (uint32_t i = n; i < PARTS; i++) {
        y[i] = y[0];
    }
    const uint64_t row = (uint64_t)p->n_tokens * p->head_dim;
    // Bindings that a form does not read get x, so that all forms share one layout. y is only written in part: the cache
    // keeps its other rows, hence UPDATE.
    keel_record(rec, &(struct keel_dispatch){
        .shader = type == KEEL_F16 ? &keel_sh_heads_fwd_f16 : type == KEEL_Q8_0 ? &keel_sh_heads_fwd_q8_0 : &keel_sh_heads_fwd, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(x), READ(normed ? w : x), READ(normed ? p->rope : x), READ(slots ? p->spans : x),
                  UPDATE(y[0]), UPDATE(y[1]), UPDATE(y[2]) },
        .n_bind = 4 + PARTS, .push = &pc, .push_bytes = sizeof pc, .groups = { heads, p->n_tokens, 1 },
        .flops = row * (8 * normed + heads), .bytes = 8 * row * heads, .label = normed ? "qk_norm_rope" : "cache_write" });
}

void keel_heads(keel_recorder *rec, const struct keel_heads_params *p)
{
    struct keel_span x = { 0 }, w = { 0 };
    bool joined = true;
    for (uint32_t i = 0; i < p->n_parts; i++) {
        joined = joined && span_join(rec, &x, p->part[i].x) && span_join(rec, &w, p->part[i].w);
    }
    if (joined) {
        record_heads(rec, p, 0, p->n_parts, x, w);
        return;
    }
    for (uint32_t i = 0; i < p->n_parts; i++) {
        record_heads(rec, p, i, 1, p->part[i].x, p->part[i].w);
    }
}

void keel_heads_bwd(keel_recorder *rec, const struct keel_heads_bwd_params *p)
{
    const uint64_t n = (uint64_t)p->n_tokens * p->n_heads * p->head_dim;
    const struct heads_bwd_pc pc = { .n_heads = p->n_heads, .head_dim = p->head_dim, .eps = p->eps };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_heads_bwd, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->w), READ(p->rope), READ(p->dy), UPDATE(p->dx) }, .n_bind = 5,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_heads, p->n_tokens, 1 },
        .flops = 16 * n, .bytes = 12 * n, .label = "qk_norm_rope_bwd" });
}
