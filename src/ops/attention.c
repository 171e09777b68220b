// SPDX-License-Identifier: MIT
// ops/attention.c: grouped-query attention over ranges of keys, forward and backward, with the probabilities of one chunk of
// tokens in memory. At the lengths keel trains on this costs less than recomputing them (portability notes 4).
#include "ops_internal.h"

#include "attention/attention.h"

static_assert(sizeof(struct attention_pc) == 48, "shaders/attention/attention.h");

#define GROUP KEEL_ATTENTION_GROUP
// Probabilities of one chunk. Large enough for 512 tokens × 8 heads × 512 keys, far below every binding limit.
#define SCRATCH_MAX (UINT64_C(48) << 20)

uint64_t keel_attention_scratch(uint32_t n_tokens, uint32_t n_heads, uint32_t max_span)
{
    const uint64_t row = 4ull * n_heads * max_span;
    return KEEL_MAX(KEEL_MIN(row * n_tokens, SCRATCH_MAX), row * KEEL_MIN(n_tokens, GROUP));
}

// One of the two products over keys, split by groups of tokens so that each dispatch stays short.
enum product { SCORES, MIX, KEYS };

struct product_args {
    enum product what;
    enum keel_dtype type; // of b
    struct keel_span a, b, spans, out; // as the shaders bind them
    uint32_t units;  // groups of tokens or keys
    uint32_t keys;   // most keys (or tokens) a group goes through
    const char *label;
};

static const struct keel_shader *pick_shader(const keel_recorder *rec, enum product what, enum keel_dtype type)
{
    static const struct keel_shader *const packed[2][2][2] = { // F16 or Q8_0, scores or mix, base or exchange
        { { &keel_sh_attn_scores_f16, &keel_sh_attn_scores_x_f16 }, { &keel_sh_attn_mix_f16, &keel_sh_attn_mix_x_f16 } },
        { { &keel_sh_attn_scores_q8_0, &keel_sh_attn_scores_x_q8_0 }, { &keel_sh_attn_mix_q8_0, &keel_sh_attn_mix_x_q8_0 } },
    };
    if (type != KEEL_F32) {
        assert(what != KEYS);
        return packed[type == KEEL_Q8_0][what == MIX][use_exchange(rec, KEEL_FAMILY_ATTENTION)];
    }
    return what == SCORES ? PICK(rec, ATTENTION, attn_scores) : what == MIX ? PICK(rec, ATTENTION, attn_mix) : PICK(rec, ATTENTION, attn_keys_bwd);
}

static void record_product(keel_recorder *rec, struct attention_pc pc, const struct product_args *p)
{
    const uint64_t unit_flops = 2ull * GROUP * p->keys * pc.head_dim * pc.n_heads;
    const uint32_t step = units_per_dispatch(rec, p->label, p->units, unit_flops, 1);
    // A CPU works through idle lanes too. For keys there are two sizes alone, since each is a pipeline of its own.
    const uint32_t lanes = p->what != SCORES ? lanes_for(rec, pc.head_dim) : on_cpu(rec) && p->keys <= LANES / 2 ? LANES / 2 : LANES;
    const uint32_t elems = keel_div_up(pc.head_dim, lanes);
    for (uint32_t i = 0; i < p->units; i += step) {
        const uint32_t n = KEEL_MIN(step, p->units - i);
        pc.group0 = i;
        pc.groups = n;
        struct keel_dispatch d = {
            .shader = pick_shader(rec, p->what, p->type),
            .bind = { READ(p->a), READ(p->b), READ(p->spans), UPDATE(p->out) }, .n_bind = 4,
            .push = &pc, .push_bytes = sizeof pc, .spec = { lanes, elems }, .n_spec = 2,
            .flops = unit_flops * n,
            .bytes = 1ull * n * p->keys * pc.n_heads * (keel_kv_head_bytes(p->type, pc.head_dim) + 4 * GROUP), .label = p->label,
        };
        if (p->what == SCORES) {
            d.n_spec = 1;
            d.groups[0] = keel_div_up(p->keys, lanes);
            d.groups[1] = n;
            d.groups[2] = pc.n_heads;
        } else {
            d.groups[0] = n;
            d.groups[1] = p->what == MIX ? pc.n_heads : pc.n_kv_heads;
            d.groups[2] = 1;
        }
        keel_record(rec, &d);
    }
}

// Tokens whose probabilities fit `bytes` at once: all, or a multiple of GROUP.
static uint32_t chunk_of(uint64_t bytes, uint64_t row_bytes, uint32_t n_tokens)
{
    const uint64_t fit = bytes / row_bytes;
    return fit >= n_tokens ? n_tokens : KEEL_MAX((uint32_t)fit / GROUP * GROUP, GROUP);
}

static void record_softmax(keel_recorder *rec, const struct attention_pc *pc, struct keel_span spans, struct keel_span p)
{
    const uint64_t n = (uint64_t)pc->p_rows * pc->n_heads * pc->p_cols;
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_attn_softmax, .spec = { reduce_lanes(rec) }, .n_spec = 1, .bind = { READ(spans), UPDATE(p) }, .n_bind = 2,
        .push = pc, .push_bytes = sizeof *pc, .groups = { pc->p_rows, pc->n_heads, 1 },
        .flops = 6 * n, .bytes = 12 * n, .label = "attn_softmax" });
}

// P = softmax(scale · q kᵀ) for the tokens of one chunk.
static void record_probabilities(keel_recorder *rec, const struct attention_pc *pc, struct keel_span q, struct keel_span k,
                                 enum keel_dtype type, struct keel_span spans, struct keel_span p, uint32_t max_union)
{
    record_product(rec, *pc, &(struct product_args){ SCORES, type, q, k, spans, p, keel_div_up(pc->p_rows, GROUP), max_union, "attn_scores" });
    record_softmax(rec, pc, spans, p);
}

// --- every token sees every key -------------------------------------------------------------------

static void record_scores_all(keel_recorder *rec, struct attention_pc pc, const struct keel_attention_params *p)
{
    const uint32_t units = keel_div_up(pc.p_rows, ATTENTION_ALL_TOKENS);
    const uint64_t unit_flops = 2ull * ATTENTION_ALL_TOKENS * pc.kv_rows * pc.head_dim * pc.n_heads;
    const uint32_t step = units_per_dispatch(rec, "attn_scores", units, unit_flops, 1);
    for (uint32_t i = 0; i < units; i += step) {
        pc.group0 = i;
        pc.groups = KEEL_MIN(step, units - i);
        keel_record(rec, &(struct keel_dispatch){
            .shader = &keel_sh_attn_scores_all, .spec = { LANES }, .n_spec = 1,
            .bind = { READ(p->q), READ(p->k), UPDATE(p->p) }, .n_bind = 3, .push = &pc, .push_bytes = sizeof pc,
            .groups = { keel_div_up(pc.kv_rows, LANES * ATTENTION_ALL_KEYS), pc.groups, pc.n_heads },
            .flops = unit_flops * pc.groups,
            .bytes = 4ull * pc.n_heads * pc.kv_rows * pc.groups * (pc.head_dim + ATTENTION_ALL_TOKENS), .label = "attn_scores" });
    }
}

static void record_mix_all(keel_recorder *rec, struct attention_pc pc, const struct keel_attention_params *p)
{
    const uint32_t quads = pc.head_dim / 4, units = keel_div_up(pc.p_rows, ATTENTION_ALL_UNIT);
    // Eight lanes read eight quads at once; six where that divides the head and eight does not (SigLIP: 18 quads).
    const uint32_t part = quads % 8 > 0 && quads % 6 == 0 ? 6 : 8;
    const uint64_t unit_flops = 2ull * ATTENTION_ALL_UNIT * pc.kv_rows * pc.head_dim * pc.n_heads;
    const uint32_t step = units_per_dispatch(rec, "attn_mix", units, unit_flops, 1);
    for (uint32_t i = 0; i < units; i += step) {
        pc.group0 = i;
        pc.groups = KEEL_MIN(step, units - i);
        keel_record(rec, &(struct keel_dispatch){
            .shader = &keel_sh_attn_mix_all, .spec = { LANES, part }, .n_spec = 2,
            .bind = { READ(p->p), READ(p->v), UPDATE(p->o) }, .n_bind = 3, .push = &pc, .push_bytes = sizeof pc,
            .groups = { keel_div_up(pc.groups * keel_div_up(quads, part), LANES / 8), pc.n_heads, 1 },
            .flops = unit_flops * pc.groups,
            .bytes = 4ull * pc.n_heads * pc.kv_rows * pc.groups * (pc.head_dim + ATTENTION_ALL_UNIT), .label = "attn_mix" });
    }
}

void keel_attention(keel_recorder *rec, const struct keel_attention_params *p)
{
    const uint32_t chunk = chunk_of(p->p.bytes, 4ull * p->n_heads * p->max_span, p->n_tokens);
    const bool all = p->all && p->type == KEEL_F32 && use_exchange(rec, KEEL_FAMILY_PATCHES) && p->head_dim % 8 == 0 && p->kv_rows % 4 == 0;
    for (uint32_t t = 0; t < p->n_tokens; t += chunk) {
        const uint32_t n = KEEL_MIN(chunk, p->n_tokens - t);
        struct attention_pc pc = {
            .n_tokens = p->first + p->n_tokens, .n_heads = p->n_heads, .n_kv_heads = p->n_kv_heads, .head_dim = p->head_dim,
            .kv_rows = p->kv_rows, .t0 = p->first + t, .p_rows = n, .p_cols = p->max_span, .scale = p->scale,
        };
        if (all) {
            record_scores_all(rec, pc, p);
            record_softmax(rec, &pc, p->spans, p->p);
            record_mix_all(rec, pc, p);
            continue;
        }
        record_probabilities(rec, &pc, p->q, p->k, p->type, p->spans, p->p, p->max_union);
        pc.scale = 1.0f;
        record_product(rec, pc, &(struct product_args){ MIX, p->type, p->p, p->v, p->spans, p->o, keel_div_up(n, GROUP), p->max_union, "attn_mix" });
    }
}

// Gradients from the tokens of one chunk, whose probabilities are in p->p.
static void record_chunk_bwd(keel_recorder *rec, struct attention_pc pc, const struct keel_attention_bwd_params *p)
{
    const uint32_t units = keel_div_up(pc.p_rows, GROUP), key_units = keel_div_up(p->n_tokens, GROUP);
    const uint32_t tokens = KEEL_MIN(p->max_q_union, pc.p_rows);
    const uint64_t n = (uint64_t)pc.p_rows * pc.n_heads * pc.p_cols;
    pc.scale = 1.0f;
    record_product(rec, pc, &(struct product_args){ SCORES, KEEL_F32, p->d_o, p->v, p->spans, p->ds, units, p->max_union, "attn_dp" });
    record_product(rec, pc, &(struct product_args){ KEYS, KEEL_F32, p->p, p->d_o, p->spans, p->dv, key_units, tokens, "attn_dv" });
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_attn_softmax_bwd, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->spans), READ(p->p), UPDATE(p->ds) }, .n_bind = 3,
        .push = &pc, .push_bytes = sizeof pc, .groups = { pc.p_rows, p->n_heads, 1 },
        .flops = 4 * n, .bytes = 16 * n, .label = "attn_softmax_bwd" });
    pc.scale = p->scale;
    record_product(rec, pc, &(struct product_args){ MIX, KEEL_F32, p->ds, p->k, p->spans, p->dq, units, p->max_union, "attn_dq" });
    record_product(rec, pc, &(struct product_args){ KEYS, KEEL_F32, p->ds, p->q, p->spans, p->dk, key_units, tokens, "attn_dk" });
}

void keel_attention_bwd(keel_recorder *rec, const struct keel_attention_bwd_params *p)
{
    const uint32_t chunk = chunk_of(KEEL_MIN(p->p.bytes, p->ds.bytes), 4ull * p->n_heads * p->max_span, p->n_tokens);
    for (uint32_t t = 0; t < p->n_tokens; t += chunk) {
        const struct attention_pc pc = {
            .n_tokens = p->n_tokens, .n_heads = p->n_heads, .n_kv_heads = p->n_kv_heads, .head_dim = p->head_dim,
            .kv_rows = p->n_tokens, .t0 = t, .p_rows = KEEL_MIN(chunk, p->n_tokens - t), .p_cols = p->max_span,
            .scale = p->scale, .add = t > 0,
        };
        if (chunk < p->n_tokens) {
            record_probabilities(rec, &pc, p->q, p->k, KEEL_F32, p->spans, p->p, p->max_union);
        }
        record_chunk_bwd(rec, pc, p);
    }
}
