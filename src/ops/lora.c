// SPDX-License-Identifier: MIT
// ops/lora.c: the low-rank products of LoRA (Hu et al. 2021), forward and backward. Three shaders serve six products, since
// A [r, K] and B [N, r] differ only in strides.
#include "ops_internal.h"

#include "lora/lora.h"

static_assert(sizeof(struct lora_pc) == 48, "shaders/lora/lora.h");

static struct lora_pc pc_a(const struct keel_lora *l, uint32_t n_tokens, float scale)
{
    return (struct lora_pc){ .wide = l->k, .rank = l->rank, .s_wide = 1, .s_rank = l->k, .n_tokens = n_tokens, .scale = scale };
}

static struct lora_pc pc_b(const struct keel_lora *l, uint32_t n_tokens, float scale)
{
    return (struct lora_pc){ .wide = l->n, .rank = l->rank, .s_wide = l->rank, .s_rank = 1, .n_tokens = n_tokens, .scale = scale };
}

static uint64_t cost_bytes(const struct lora_pc *pc)
{
    return 4ull * ((uint64_t)pc->n_tokens * (pc->wide + pc->rank) + (uint64_t)pc->wide * pc->rank);
}

// For `n` matrices, whose places in m and h stand in pc.
static void reduce(keel_recorder *rec, const struct lora_pc *pc, uint32_t n, struct keel_span x, struct keel_span m,
                   struct keel_span h, const char *label)
{
    // Lanes a token: all 64 for a few tokens, one each for many.
    const uint32_t slices = pc->n_tokens >= 64 ? 1 : pc->n_tokens >= 8 ? 8 : 64;
    const bool aligned = (pc->wide | pc->m_at[0] | pc->m_at[1] | pc->m_at[2]) % 4 == 0;
    const uint32_t four = !aligned ? LORA_ONE : pc->s_wide == 1 ? LORA_FOUR_WIDE : pc->rank % 4 == 0 ? LORA_FOUR_RANK : LORA_ONE;
    keel_record(rec, &(struct keel_dispatch){
        .shader = PICK(rec, LORA, lora_reduce), .spec = { LANES, slices, four }, .n_spec = 3,
        .bind = { READ(x), READ(m), UPDATE(h) }, .n_bind = 3, .push = pc, .push_bytes = sizeof *pc,
        .groups = { keel_div_up(pc->n_tokens, LANES / slices), keel_div_up(pc->rank, 8), n },
        .flops = 2ull * n * pc->n_tokens * pc->wide * pc->rank, .bytes = n * cost_bytes(pc), .label = label });
}

static void expand(keel_recorder *rec, const struct lora_pc *pc, struct keel_span h, struct keel_span m, struct keel_span y,
                   const char *label)
{
    const bool along = pc->s_wide == 1 && pc->wide % 4 == 0 && on_cpu(rec); // a GPU wants lanes
    const uint32_t four = pc->rank % 4 != 0 ? LORA_ONE : pc->s_rank == 1 ? LORA_FOUR_RANK : along ? LORA_FOUR_WIDE : LORA_FOUR_H;
    const bool quads = four == LORA_FOUR_WIDE;
    const uint32_t tokens = pc->n_tokens >= 8 && !quads ? 8 : pc->n_tokens >= 4 ? 4 : 1;
    const uint32_t n = quads ? pc->wide / 4 : pc->wide, lanes = lanes_for(rec, n);
    keel_record(rec, &(struct keel_dispatch){
        .shader = PICK(rec, LORA, lora_expand), .spec = { lanes, tokens, four }, .n_spec = 3,
        .bind = { READ(h), READ(m), UPDATE(y) }, .n_bind = 3, .push = pc, .push_bytes = sizeof *pc,
        .groups = { keel_div_up(n, lanes), keel_div_up(pc->n_tokens, tokens), 1 },
        .flops = 2ull * pc->n_tokens * pc->wide * pc->rank, .bytes = cost_bytes(pc), .label = label });
}

static void outer(keel_recorder *rec, const struct lora_pc *pc, struct keel_span z, struct keel_span h, struct keel_span m,
                  const char *label)
{
    const bool four = on_cpu(rec) && pc->wide % 4 == 0 && pc->rank % 4 == 0;
    const uint32_t n = four ? pc->wide / 4 : pc->wide, lanes = lanes_for(rec, n);
    keel_record(rec, &(struct keel_dispatch){
        .shader = PICK(rec, LORA, lora_outer), .spec = { lanes, four }, .n_spec = 2,
        .bind = { READ(z), READ(h), UPDATE(m) }, .n_bind = 3, .push = pc, .push_bytes = sizeof *pc,
        .groups = { keel_div_up(n, lanes), keel_div_up(pc->rank, four ? 4 : 8), 1 },
        .flops = 2ull * pc->n_tokens * pc->wide * pc->rank, .bytes = cost_bytes(pc), .label = label });
}

void keel_lora_down(keel_recorder *rec, const struct keel_lora *l, struct keel_span x, struct keel_span h, uint32_t n_tokens)
{
    const struct lora_pc pc = pc_a(l, n_tokens, 1.0f);
    reduce(rec, &pc, 1, x, l->a, h, "lora_down");
}

void keel_lora_down_group(keel_recorder *rec, const struct keel_lora *const *l, uint32_t n, struct keel_span x,
                          const struct keel_span *h, uint32_t n_tokens)
{
    struct keel_span all_a = { 0 }, all_h = { 0 };
    bool joined = n <= KEEL_MAX_LINEAR_PARTS;
    for (uint32_t i = 0; i < n && joined; i++) {
        joined = l[i]->rank == l[0]->rank && span_join(rec, &all_a, l[i]->a) && span_join(rec, &all_h, h[i]);
    }
    if (!joined) {
        for (uint32_t i = 0; i < n; i++) {
            keel_lora_down(rec, l[i], x, h[i], n_tokens);
        }
        return;
    }
    struct lora_pc pc = pc_a(l[0], n_tokens, 1.0f);
    for (uint32_t i = 0; i < n; i++) {
        pc.m_at[i] = span_words(all_a, l[i]->a);
        pc.h_at[i] = span_words(all_h, h[i]);
    }
    reduce(rec, &pc, n, x, all_a, all_h, "lora_down");
}

void keel_lora_up(keel_recorder *rec, const struct keel_lora *l, struct keel_span h, struct keel_span y, uint32_t n_tokens)
{
    const struct lora_pc pc = pc_b(l, n_tokens, l->scale);
    expand(rec, &pc, h, l->b, y, "lora_up");
}

void keel_lora_bwd_h(keel_recorder *rec, const struct keel_lora *l, struct keel_span dy, struct keel_span dh, uint32_t n_tokens)
{
    const struct lora_pc pc = pc_b(l, n_tokens, l->scale);
    reduce(rec, &pc, 1, dy, l->b, dh, "lora_bwd_h");
}

void keel_lora_bwd_x(keel_recorder *rec, const struct keel_lora *l, struct keel_span dh, struct keel_span dx, uint32_t n_tokens)
{
    const struct lora_pc pc = pc_a(l, n_tokens, 1.0f);
    expand(rec, &pc, dh, l->a, dx, "lora_bwd_x");
}

void keel_lora_bwd_a(keel_recorder *rec, const struct keel_lora *l, struct keel_span dh, struct keel_span x, struct keel_span da,
                     uint32_t n_tokens)
{
    const struct lora_pc pc = pc_a(l, n_tokens, 1.0f);
    outer(rec, &pc, x, dh, da, "lora_bwd_a");
}

void keel_lora_bwd_b(keel_recorder *rec, const struct keel_lora *l, struct keel_span dy, struct keel_span h, struct keel_span db,
                     uint32_t n_tokens)
{
    const struct lora_pc pc = pc_b(l, n_tokens, l->scale);
    outer(rec, &pc, dy, h, db, "lora_bwd_b");
}
