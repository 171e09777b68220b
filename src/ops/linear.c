// SPDX-License-Identifier: MIT
// ops/linear.c: products with frozen weights, forward and backward, and rows of the embedding.
// Owns the choice of tile sizes and the split into dispatches. Does not own weights.
#include "ops_internal.h"

#include "linear/linear.h"

#include <string.h>

static_assert(sizeof(struct linear_pc) == 40, "shaders/linear/linear.h");

struct type_shaders {
    enum keel_dtype type;
    const char *fwd_label, *bwd_label;
    const struct keel_shader *fwd[2], *bwd[2]; // [exchange]
    const struct keel_shader *embed;
};

#define TYPE(t)                                                                                                        \
    { KEEL_##t, "linear " #t, "linear_bwd " #t, { &keel_sh_linear_fwd_##t, &keel_sh_linear_fwd_x_##t },                          \
      { &keel_sh_linear_bwd_##t, &keel_sh_linear_bwd_x_##t }, &keel_sh_embed_##t }
static const struct type_shaders *shaders_of(enum keel_dtype type)
{
    static const struct type_shaders all[] = {
        TYPE(F32),  TYPE(F16),  TYPE(BF16), TYPE(Q4_0), TYPE(Q4_1), TYPE(Q5_0),
        TYPE(Q5_1), TYPE(Q8_0), TYPE(Q4_K), TYPE(Q5_K), TYPE(Q6_K),
    };
    for (size_t i = 0; i < KEEL_COUNT(all); i++) {
        if (all[i].type == type) {
            return &all[i];
        }
    }
    KEEL_ASSERT(!"a matrix has one of the types above");
    return NULL;
}

static uint64_t row_bytes(const struct keel_matrix *w)
{
    return keel_tile_bytes(w->type, 64, w->cols) / 64;
}

// Tokens and tiles of rows that a lane works on, and parts that K is cut into. A lane wants many tokens for each weight it unpacks.
// With exchange, weights and sums beyond the registers spill to memory that is fast on CPUs, but the loop must stay within their
// instruction cache: 8 × 4 does. A GPU needs lanes above all: few rows (640 in the smallest model) times few tokens would leave
// most of it idle.
struct tiling {
    uint32_t tokens, tiles, slices;
};
#define MANY_LANES 65536u // enough for the largest GPU: 132 multiprocessors × 512 lanes

static struct tiling tiling_of(const struct keel_caps *caps, bool exchange, uint32_t n_tokens, uint32_t n_tiles, uint32_t kb)
{
    const bool gpu = strcmp(caps->kind, "cpu") != 0;
    struct tiling t = { n_tokens >= 8 ? 8 : n_tokens >= 4 ? 4 : n_tokens >= 2 ? 2 : 1, 1, 1 };
    const uint32_t most = exchange ? 4 : 2;
    const uint32_t lanes = n_tiles * LANES * keel_div_up(n_tokens, t.tokens);
    while (t.tiles < most && n_tiles >= 4 * t.tiles && !(gpu && lanes / (t.tiles * 2) < MANY_LANES)) { // keep two workgroups
        t.tiles *= 2;
    }
    while (gpu && lanes / t.tiles * t.slices < MANY_LANES && LANES * t.slices * 2 <= KEEL_MIN(caps->max_workgroup, 512u) &&
           kb >= t.slices * 8 && (t.slices * 2 - 1) * LANES * t.tiles * t.tokens * 4 <= caps->max_shared) {
        t.slices *= 2;
    }
    return t;
}

void keel_linear(keel_recorder *rec, const struct keel_linear_params *p)
{
    const struct keel_matrix *w = p->w;
    const struct type_shaders *sh = shaders_of(w->type);
    const struct keel_caps *caps = keel_device_caps(keel_recorder_device(rec));
    const enum keel_family family = p->n_tokens < KEEL_MATMUL_TOKENS ? KEEL_FAMILY_MATVEC : KEEL_FAMILY_MATMUL;
    const bool exchange = use_exchange(rec, family) && w->cols % 4 == 0; // x is read as texels of four numbers
    for (uint32_t i = 0; i < w->n_shards; i++) {
        const struct keel_shard *s = &w->shard[i];
        const uint32_t tiles = keel_div_up(s->rows, 64);
        const struct tiling tiling = tiling_of(caps, exchange, p->n_tokens, tiles, keel_div_up(w->cols, 32));
        const uint32_t tokens = tiling.tokens, tiles_lane = tiling.tiles;
        const uint32_t groups_t = keel_div_up(p->n_tokens, tokens);
        const uint64_t tile_flops = UINT64_C(128) * w->cols * p->n_tokens;
        const uint32_t step = units_per_dispatch(rec, tiles, tile_flops, tiles_lane);
        // One tile may still be too much for long batches: then the tokens are split as well.
        const uint32_t step_t = units_per_dispatch(rec, groups_t, UINT64_C(128) * w->cols * tokens * step, 1);
        for (uint32_t tile = 0; tile < tiles; tile += step) {
            for (uint32_t g = 0; g < groups_t; g += step_t) {
                const uint32_t n = KEEL_MIN(step, tiles - tile), ng = KEEL_MIN(step_t, groups_t - g);
                const struct linear_pc pc = {
                    .k = w->cols, .kb = keel_div_up(w->cols, 32), .n = s->rows, .n_total = w->rows, .row0 = s->row0,
                    .tile0 = tile, .tiles = n, .t0 = g * tokens, .n_tokens = p->n_tokens, .add = p->add,
                };
                keel_record(rec, &(struct keel_dispatch){
                    .shader = sh->fwd[exchange],
                    .spec = { LANES * tiling.slices, tiles_lane, tokens, tiling.slices, w->cols % 32 != 0 }, .n_spec = 5,
                    .bind = { READ(s->span), READ(p->x), UPDATE(p->y) }, .n_bind = 3,
                    .push = &pc, .push_bytes = sizeof pc,
                    .groups = { keel_div_up(n, tiles_lane), ng, 1 },
                    .flops = tile_flops * n * ng / groups_t,
                    .bytes = row_bytes(w) * 64 * n + 4ull * ng * tokens * (w->cols + 64ull * n),
                    .label = sh->fwd_label });
            }
        }
    }
}

void keel_linear_bwd(keel_recorder *rec, const struct keel_linear_bwd_params *p)
{
    const struct keel_matrix *w = p->w;
    const struct type_shaders *sh = shaders_of(w->type);
    const bool exchange = use_exchange(rec, KEEL_FAMILY_MATMUL_BWD) && w->rows % 4 == 0; // dy as texels
    // 16 sums each: with more than four tokens a GPU spills registers.
    const uint32_t tokens = exchange && p->n_tokens >= 8 ? 8 : p->n_tokens >= 4 ? 4 : p->n_tokens >= 2 ? 2 : 1;
    const uint32_t groups_t = keel_div_up(p->n_tokens, tokens);
    const uint32_t lanes_k = keel_div_up(w->cols, 32) * 2;
    // At most 16384 rows in one loop: lavapipe 22.3 stops silently after 65535 iterations (portability notes 0.1).
    const uint32_t step_rows = 16384 / 64;
    bool add = p->add;
    for (uint32_t i = 0; i < w->n_shards; i++) {
        const struct keel_shard *s = &w->shard[i];
        const uint32_t tiles = keel_div_up(s->rows, 64);
        const uint64_t group_flops = UINT64_C(128) * w->cols * tokens; // of one tile of rows
        const uint32_t step = KEEL_MIN(units_per_dispatch(rec, tiles, group_flops * groups_t, 1), step_rows);
        const uint32_t step_t = units_per_dispatch(rec, groups_t, group_flops * step, 1);
        for (uint32_t tile = 0; tile < tiles; tile += step) {
            for (uint32_t g = 0; g < groups_t; g += step_t) {
                const uint32_t n = KEEL_MIN(step, tiles - tile), ng = KEEL_MIN(step_t, groups_t - g);
                const struct linear_pc pc = {
                    .k = w->cols, .kb = keel_div_up(w->cols, 32), .n = s->rows, .n_total = w->rows, .row0 = s->row0,
                    .tile0 = tile, .tiles = n, .t0 = g * tokens, .n_tokens = p->n_tokens, .add = add,
                };
                keel_record(rec, &(struct keel_dispatch){
                    .shader = sh->bwd[exchange],
                    .spec = { LANES, tokens }, .n_spec = 2,
                    .bind = { READ(s->span), READ(p->dy), UPDATE(p->dx) }, .n_bind = 3,
                    .push = &pc, .push_bytes = sizeof pc,
                    .groups = { keel_div_up(lanes_k, LANES), ng, 1 },
                    .flops = group_flops * n * ng,
                    .bytes = row_bytes(w) * 64 * n + 4ull * ng * tokens * (w->cols + 64ull * n),
                    .label = sh->bwd_label });
            }
            add = true;
        }
    }
}

void keel_embed(keel_recorder *rec, const struct keel_embed_params *p)
{
    const struct keel_matrix *w = p->w;
    for (uint32_t i = 0; i < w->n_shards; i++) {
        const struct keel_shard *s = &w->shard[i];
        const struct embed_pc pc = {
            .k = w->cols, .kb = keel_div_up(w->cols, 32), .row0 = s->row0, .n = s->rows,
            .n_tokens = p->n_tokens, .scale = p->scale,
        };
        // READ_WRITE: other shards fill in the other tokens' rows
        keel_record(rec, &(struct keel_dispatch){
            .shader = shaders_of(w->type)->embed, .spec = { LANES }, .n_spec = 1,
            .bind = { READ(s->span), READ(p->ids), UPDATE(p->y) }, .n_bind = 3,
            .push = &pc, .push_bytes = sizeof pc,
            .groups = { keel_div_up(pc.kb * 2, LANES), p->n_tokens, 1 },
            .flops = (uint64_t)p->n_tokens * w->cols,
            .bytes = p->n_tokens * (row_bytes(w) + 4ull * w->cols),
            .label = "embed" });
    }
}
