// SPDX-License-Identifier: MIT
// ops/linear.c: products with frozen weights, forward and backward, and rows of the embedding.
// Owns the choice of tile sizes and the split into dispatches. Does not own weights.
#include "ops_internal.h"

#include "linear/linear.h"

#include <string.h>

static_assert(sizeof(struct linear_pc) == 40 && sizeof(struct linear_fwd_pc) == 124, "shaders/linear/linear.h");

struct type_shaders {
    enum keel_dtype type;
    const char *fwd_label, *bwd_label;
    const struct keel_shader *fwd[2], *bwd[2]; // [exchange]
    const struct keel_shader *coop_fwd, *coop_bwd, *dot; // dot: NULL if there is none
    const struct keel_shader *embed;
};

#define TYPE(t) TYPE_DOT(t, NULL)
#define TYPE_DOT(t, dot)                                                                                                       \
    { KEEL_##t, "linear " #t, "linear_bwd " #t, { &keel_sh_linear_fwd_##t, &keel_sh_linear_fwd_x_##t },                          \
      { &keel_sh_linear_bwd_##t, &keel_sh_linear_bwd_x_##t }, &keel_sh_linear_coop_fwd_##t, &keel_sh_linear_coop_bwd_##t, dot,                \
      &keel_sh_embed_##t }
static const struct type_shaders *shaders_of(enum keel_dtype type)
{
    static const struct type_shaders all[] = {
        TYPE(F32),  TYPE(F16),  TYPE(BF16), TYPE(Q4_1), TYPE(Q5_0), TYPE(Q5_1), TYPE(Q4_K), TYPE(Q5_K), TYPE(Q6_K),
        TYPE_DOT(Q4_0, &keel_sh_linear_fwd_dot_Q4_0), TYPE_DOT(Q8_0, &keel_sh_linear_fwd_dot_Q8_0),
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

// Tokens and rows (tiles, on a GPU) that a lane works on, and parts that K is cut into. A lane wants many tokens for each weight it
// unpacks. With exchange, weights and sums beyond the registers spill to memory that is fast on CPUs, but the loop must stay within their
// instruction cache: 8 × 4 does. A few tokens take 8: with lanes of a subgroup of 8 that is a tile, read in order, and decode twice as
// fast as with 4. A GPU needs lanes above all: few rows (640 in the smallest model) times few tokens would leave most of it idle.
struct tiling {
    uint32_t tokens, tiles, slices;
};
#define MANY_LANES 65536u // enough for the largest GPU: 132 multiprocessors × 512 lanes

// rows: of W, that a workgroup takes at a step; least: steps at least (tiles, with rows of a whole tile).
static struct tiling tiling_of(const struct keel_caps *caps, bool exchange, uint32_t rows, uint32_t n_tokens, uint32_t n_tiles,
                               uint32_t least, uint32_t kb)
{
    const bool gpu = strcmp(caps->kind, "cpu") != 0;
    struct tiling t = { n_tokens >= 8 ? 8 : n_tokens >= 4 ? 4 : n_tokens >= 2 ? 2 : 1, least, 1 };
    const uint32_t most = !exchange ? 2 : !gpu && n_tokens < KEEL_MATMUL_TOKENS ? 8 : 4;
    const uint32_t lanes = n_tiles * LANES * keel_div_up(n_tokens, t.tokens);
    while (t.tiles < most && n_tiles * (LANES / rows) >= 4 * t.tiles && !(gpu && lanes / (t.tiles * 2) < MANY_LANES)) { // keep two workgroups
        t.tiles *= 2;
    }
    while (gpu && lanes / t.tiles * t.slices < MANY_LANES && LANES * t.slices * 2 <= KEEL_MIN(caps->max_workgroup, 512u) &&
           kb >= t.slices * 8 && (t.slices * 2 - 1) * LANES * t.tiles * t.tokens * 4 <= caps->max_shared) {
        t.slices *= 2;
    }
    return t;
}

// How a dispatch of a product is made: constants of its shader, and what a workgroup works on.
struct plan {
    const struct keel_shader *shader;
    uint32_t spec[KEEL_MAX_SPEC], n_spec, subgroup;
    uint32_t tokens, columns; // of the result; forward: columns are rows of W, whole tiles
};

// Workgroups on cooperative matrices, the largest first: there more subgroups share what is laid down, but fewer workgroups are there.
static const struct coop_size {
    uint32_t subs_t, frags_t, frags_c, columns; // subgroups along the tokens; fragments of a subgroup; columns of the result
} coop_sizes[] = { { 2, 4, 2, 128 }, { 2, 2, 2, 64 }, { 1, 2, 2, 64 } };
#define MANY_WORKGROUPS 132u // multiprocessors of the largest GPU

static struct plan coop_plan(const struct keel_caps *c, const struct coop_size *s, bool pairs)
{
    const uint32_t subs_c = s->columns / (s->frags_c * c->coop.n);
    return (struct plan){ .subgroup = c->subgroup_size, .tokens = s->subs_t * s->frags_t * c->coop.m, .columns = s->columns, .n_spec = 9,
                          .spec = { s->subs_t * subs_c * c->subgroup_size, c->coop.m, c->coop.n, c->coop.k, s->subs_t, subs_c, s->frags_t,
                                    s->frags_c, pairs } };
}

// Whether the device can hold the workgroup. The sizes are those of shaders/linear/linear_coop.comp.
static bool coop_fits(const struct keel_caps *c, const struct plan *p, bool backward)
{
    const uint32_t subs = p->spec[0] / p->subgroup;
    const uint32_t halves = p->tokens * 40 + (backward ? 32 * (p->columns + 8) : p->columns * 40);
    const uint32_t bytes = halves * (p->spec[8] ? 4 : 2) + subs * c->coop.m * c->coop.n * 4 + p->tokens * 4;
    return p->spec[0] <= c->max_workgroup && bytes <= c->max_shared;
}

static bool coop_chosen(const keel_recorder *rec, enum keel_family family)
{
    const enum keel_variant v = keel_variant_of(keel_recorder_device(rec), family);
    return v == KEEL_VARIANT_COOP || v == KEEL_VARIANT_COOP16;
}

// Cooperative matrices where they were chosen and the tokens are many enough. False: another variant.
static bool plan_coop(const keel_recorder *rec, enum keel_family family, const struct keel_shader *shader, uint32_t n_tokens,
                      uint32_t n_columns, uint32_t n_parts, struct plan *out)
{
    const struct keel_caps *c = keel_device_caps(keel_recorder_device(rec));
    const bool chosen = coop_chosen(rec, family), pairs = keel_variant_of(keel_recorder_device(rec), family) == KEEL_VARIANT_COOP;
    bool fits = false;
    *out = (struct plan){ 0 };
    for (uint32_t i = 0; i < KEEL_COUNT(coop_sizes) && chosen && !fits && n_tokens >= KEEL_MATMUL_TOKENS; i++) {
        *out = coop_plan(c, &coop_sizes[i], pairs);
        const bool many = n_tokens > out->tokens / 2 &&
                          keel_div_up(n_tokens, out->tokens) * keel_div_up(n_columns, out->columns) >= MANY_WORKGROUPS;
        fits = coop_fits(c, out, family == KEEL_FAMILY_MATMUL_BWD) && (many || i + 1 == KEEL_COUNT(coop_sizes));
    }
    out->shader = shader;
    out->spec[out->n_spec++] = n_parts;
    return fits;
}

// A forward product over one shard, or over matrices that lie together.
struct product {
    const struct keel_matrix *w; // of the first part: type and columns
    struct keel_span weights, x, y, h, b;
    struct linear_fwd_pc pc; // all but which tiles and tokens
    uint32_t n_parts, tiles; // tiles: of all parts, or of gate
    bool glu, lora;
};

static enum keel_family forward_family(uint32_t n_tokens)
{
    return n_tokens < KEEL_MATMUL_TOKENS ? KEEL_FAMILY_MATVEC : KEEL_FAMILY_MATMUL;
}

static struct plan plan_product(const keel_recorder *rec, const struct product *p)
{
    const struct type_shaders *sh = shaders_of(p->w->type);
    const uint32_t n_tokens = p->pc.n_tokens, k = p->w->cols, pair = p->glu ? 2 : 1;
    const enum keel_family family = forward_family(n_tokens);
    struct plan plan;
    if (!p->glu && !p->lora && plan_coop(rec, family, sh->coop_fwd, n_tokens, p->tiles * 64, p->n_parts, &plan)) {
        return plan;
    }
    const bool exchange = use_exchange(rec, family) && k % 4 == 0; // x is read as texels of four numbers
    const uint32_t rows = lanes_for(rec, 1); // shaders/linear/linear_fwd.comp
    const struct tiling t = tiling_of(keel_device_caps(keel_recorder_device(rec)), exchange, rows, n_tokens, p->tiles * pair, pair,
                                      keel_div_up(k, 32));
    const uint32_t dot_shared = 56 * keel_div_up(k, 32) + (t.slices - 1) * LANES * t.tiles * 4; // shaders/linear/dot.glsl
    if (sh->dot && n_tokens == 1 && dot_shared <= keel_device_caps(keel_recorder_device(rec))->max_shared &&
        keel_variant_of(keel_recorder_device(rec), family) == KEEL_VARIANT_DOT) {
        return (struct plan){ .shader = sh->dot, .tokens = 1, .columns = t.tiles / pair * 64, .n_spec = 9,
                              .spec = { LANES * t.slices, t.tiles, 1, t.slices, 0, p->n_parts, p->glu, p->lora, keel_div_up(k, 32) } };
    }
    return (struct plan){ .shader = sh->fwd[exchange], .tokens = t.tokens, .columns = t.tiles / pair * rows, .n_spec = 8,
                          .spec = { rows * t.slices, t.tiles, t.tokens, t.slices, k % 32 != 0, p->n_parts, p->glu, p->lora } };
}

static void record_product(keel_recorder *rec, const struct product *p)
{
    const struct type_shaders *sh = shaders_of(p->w->type);
    const uint32_t n_tokens = p->pc.n_tokens, k = p->w->cols, pair = p->glu ? 2 : 1;
    const struct plan plan = plan_product(rec, p);
    const uint32_t groups_t = keel_div_up(n_tokens, plan.tokens), units = KEEL_MAX(plan.columns / 64, 1u);
    const uint64_t token_flops = UINT64_C(128) * pair * (k + (p->lora ? p->pc.rank : 0)); // of one tile
    const uint32_t step = units_per_dispatch(rec, sh->fwd_label, p->tiles, token_flops * n_tokens, units);
    // One tile may still be too much for long batches: then the tokens are split as well.
    const uint32_t step_t = units_per_dispatch(rec, sh->fwd_label, groups_t, token_flops * plan.tokens * step, 1);
    struct linear_fwd_pc pc = p->pc;
    for (uint32_t tile = 0; tile < p->tiles; tile += step) {
        for (uint32_t g = 0; g < groups_t; g += step_t) {
            const uint32_t n = KEEL_MIN(step, p->tiles - tile), ng = KEEL_MIN(step_t, groups_t - g);
            pc.tile0 = tile;
            pc.tiles = n;
            pc.t0 = g * plan.tokens;
            // Without LoRA its bindings still need a buffer: x, which is not read through them.
            struct keel_dispatch d = {
                .shader = plan.shader, .n_spec = plan.n_spec, .subgroup = plan.subgroup,
                .bind = { READ(p->weights), READ(p->x), UPDATE(p->y), READ(p->lora ? p->h : p->x), READ(p->lora ? p->b : p->x) },
                .n_bind = 5, .push = &pc, .push_bytes = sizeof pc,
                .groups = { keel_div_up(n * 64, plan.columns), ng, 1 },
                .flops = token_flops * n_tokens * n * ng / groups_t,
                .bytes = row_bytes(p->w) * 64 * n * pair + 4ull * ng * plan.tokens * (k + 64ull * n),
                .label = sh->fwd_label };
            memcpy(d.spec, plan.spec, sizeof d.spec);
            keel_record(rec, &d);
        }
    }
}

static struct linear_fwd_pc fwd_pc(const struct keel_matrix *w, uint32_t n_tokens, bool add)
{
    return (struct linear_fwd_pc){ .k = w->cols, .kb = keel_div_up(w->cols, 32), .n_total = w->rows, .n_tokens = n_tokens, .add = add };
}

void keel_linear(keel_recorder *rec, const struct keel_linear_params *p)
{
    for (uint32_t i = 0; i < p->w->n_shards; i++) {
        const struct keel_shard *s = &p->w->shard[i];
        struct product one = { .w = p->w, .weights = s->span, .x = p->x, .y = p->y, .n_parts = 1,
                               .pc = fwd_pc(p->w, p->n_tokens, p->add), .tiles = keel_div_up(s->rows, 64) };
        one.pc.row0 = s->row0;
        one.pc.part[0].n = s->rows;
        record_product(rec, &one);
    }
}

// The parts as one product. False if a single dispatch cannot hold them.
static bool join_parts(const keel_recorder *rec, const struct keel_linear_part *part, uint32_t n, const struct product *base,
                       struct product *out)
{
    const struct keel_matrix *w = part[0].w;
    *out = *base;
    out->w = w;
    out->n_parts = n;
    out->pc.n_total = w->rows;
    out->lora = part[0].lora != NULL;
    out->pc.rank = out->lora ? part[0].lora->rank : 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct keel_lora *l = part[i].lora;
        if (part[i].w->type != w->type || part[i].w->n_shards != 1 || out->lora != (l != NULL) || (l && l->rank != out->pc.rank) ||
            !span_join(rec, &out->weights, part[i].w->shard[0].span) || !span_join(rec, &out->y, part[i].y) ||
            (l && (!span_join(rec, &out->h, part[i].h) || !span_join(rec, &out->b, l->b)))) {
            return false;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        const struct keel_linear_part *p = &part[i];
        out->pc.part[i] = (struct linear_part){
            .w = span_words(out->weights, p->w->shard[0].span), .tile = out->glu ? 0 : out->tiles, .n = p->w->rows,
            .y = span_words(out->y, p->y) };
        if (p->lora) {
            out->pc.part[i].h = span_words(out->h, p->h);
            out->pc.part[i].b = span_words(out->b, p->lora->b);
            out->pc.part[i].scale = p->lora->scale;
        }
        out->tiles = out->glu && i > 0 ? out->tiles : out->tiles + keel_div_up(p->w->rows, 64);
    }
    return true;
}

// A product whose matrix or adapter takes more than one dispatch.
static void record_apart(keel_recorder *rec, const struct keel_linear_part *part, struct keel_span x, uint32_t n_tokens)
{
    keel_linear(rec, &(struct keel_linear_params){ .w = part->w, .x = x, .y = part->y, .n_tokens = n_tokens });
    if (part->lora) {
        keel_lora_up(rec, part->lora, part->h, part->y, n_tokens);
    }
}

// For a few tokens a dispatch costs more than what is in it; for many, the LoRA product's own shader reads B once for more of them.
static bool lora_in_product(const struct keel_linear_group_params *p)
{
    return p->n_tokens < KEEL_MATMUL_TOKENS;
}

void keel_linear_group(keel_recorder *rec, const struct keel_linear_group_params *p)
{
    struct keel_linear_part part[KEEL_MAX_LINEAR_PARTS];
    struct product base = { .x = p->x, .pc = fwd_pc(p->part[0].w, p->n_tokens, false), .glu = p->glu }, joined;
    const bool fuse_lora = lora_in_product(p);
    bool any_lora = false;
    for (uint32_t i = 0; i < p->n_parts; i++) {
        part[i] = p->part[i];
        any_lora = any_lora || part[i].lora;
        part[i].lora = fuse_lora ? part[i].lora : NULL;
    }
    const bool coop = coop_chosen(rec, forward_family(p->n_tokens)); // has no joined form of gate and up
    if (p->glu && !coop && (fuse_lora || !any_lora) && join_parts(rec, part, 2, &base, &joined)) {
        record_product(rec, &joined);
        return;
    }
    base.glu = false;
    for (uint32_t i = 0, n; i < p->n_parts; i += n) {
        n = p->n_parts - i;
        while (n > 0 && !join_parts(rec, part + i, n, &base, &joined)) {
            n--;
        }
        if (n > 0) {
            record_product(rec, &joined);
        } else {
            record_apart(rec, &part[i], p->x, p->n_tokens);
            n = 1;
        }
    }
    for (uint32_t i = 0; i < p->n_parts && !fuse_lora; i++) {
        if (p->part[i].lora) {
            keel_lora_up(rec, p->part[i].lora, p->part[i].h, p->part[i].y, p->n_tokens);
        }
    }
    if (p->glu) {
        keel_geglu(rec, p->part[0].y, p->part[1].y, p->part[0].y, (uint64_t)p->n_tokens * p->part[0].w->rows);
    }
}

static struct plan plan_bwd(const keel_recorder *rec, const struct keel_matrix *w, uint32_t n_tokens)
{
    const struct type_shaders *sh = shaders_of(w->type);
    struct plan plan;
    if (plan_coop(rec, KEEL_FAMILY_MATMUL_BWD, sh->coop_bwd, n_tokens, w->cols, 1, &plan)) {
        return plan;
    }
    const bool exchange = use_exchange(rec, KEEL_FAMILY_MATMUL_BWD) && w->rows % 4 == 0; // dy as texels
    // 16 sums each: with more than four tokens a GPU spills registers.
    const uint32_t tokens = exchange && n_tokens >= 8 ? 8 : n_tokens >= 4 ? 4 : n_tokens >= 2 ? 2 : 1;
    const uint32_t lanes = lanes_for(rec, keel_div_up(w->cols, 32) * 2);
    return (struct plan){ .shader = sh->bwd[exchange], .tokens = tokens, .columns = lanes * 16, .n_spec = 2, .spec = { lanes, tokens } };
}

void keel_linear_bwd(keel_recorder *rec, const struct keel_linear_bwd_params *p)
{
    const struct keel_matrix *w = p->w;
    const struct type_shaders *sh = shaders_of(w->type);
    const struct plan plan = plan_bwd(rec, w, p->n_tokens);
    const uint32_t tokens = plan.tokens, groups_t = keel_div_up(p->n_tokens, tokens);
    // At most 16384 rows in one loop: lavapipe 22.3 stops silently after 65535 iterations (portability notes 0.1).
    const uint32_t step_rows = 16384 / 64;
    bool add = p->add;
    for (uint32_t i = 0; i < w->n_shards; i++) {
        const struct keel_shard *s = &w->shard[i];
        const uint32_t tiles = keel_div_up(s->rows, 64);
        const uint64_t group_flops = UINT64_C(128) * w->cols * tokens; // of one tile of rows
        const uint32_t step = KEEL_MIN(units_per_dispatch(rec, sh->bwd_label, tiles, group_flops * groups_t, 1), step_rows);
        const uint32_t step_t = units_per_dispatch(rec, sh->bwd_label, groups_t, group_flops * step, 1);
        for (uint32_t tile = 0; tile < tiles; tile += step) {
            for (uint32_t g = 0; g < groups_t; g += step_t) {
                const uint32_t n = KEEL_MIN(step, tiles - tile), ng = KEEL_MIN(step_t, groups_t - g);
                const struct linear_pc pc = {
                    .k = w->cols, .kb = keel_div_up(w->cols, 32), .n = s->rows, .n_total = w->rows, .row0 = s->row0,
                    .tile0 = tile, .tiles = n, .t0 = g * tokens, .n_tokens = p->n_tokens, .add = add,
                };
                struct keel_dispatch d = {
                    .shader = plan.shader, .n_spec = plan.n_spec, .subgroup = plan.subgroup,
                    .bind = { READ(s->span), READ(p->dy), UPDATE(p->dx) }, .n_bind = 3,
                    .push = &pc, .push_bytes = sizeof pc,
                    .groups = { keel_div_up(keel_div_up(w->cols, 32) * 32, plan.columns), ng, 1 },
                    .flops = group_flops * n * ng,
                    .bytes = row_bytes(w) * 64 * n + 4ull * ng * tokens * (w->cols + 64ull * n),
                    .label = sh->bwd_label };
                memcpy(d.spec, plan.spec, sizeof d.spec);
                keel_record(rec, &d);
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
