// SPDX-License-Identifier: MIT
// ops/rows.c: ops on marked rows: steering the residual stream and adding up what passes through it.
#include "ops_internal.h"

#include "rows/rows.h"

static_assert(sizeof(struct rows_pc) == 20, "shaders/rows/rows.h");
static_assert((int)KEEL_ABLATE == ROWS_ABLATE && (int)KEEL_CAP == ROWS_CAP && (int)KEEL_FLOOR == ROWS_FLOOR, "modes");

void keel_rows_add(keel_recorder *rec, const struct keel_rows_add_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct rows_pc pc = { .width = p->width, .a = p->a };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_rows_add, .spec = { LANES }, .n_spec = 1,
        .bind = { UPDATE(p->x), READ(p->v), READ(p->marks) }, .n_bind = 3, .push = &pc, .push_bytes = sizeof pc,
        .groups = { keel_div_up(p->width, LANES), p->n_rows, 1 }, .flops = 2 * n, .bytes = 8 * n, .label = "rows_add" });
}

void keel_rows_project(keel_recorder *rec, const struct keel_rows_project_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const bool limit = p->mode != KEEL_ABLATE;
    const struct rows_pc pc = { .width = p->width, .k = p->k, .a = p->limit };
    KEEL_ASSERT(!limit || p->k == 1);
    // Ablating, the binding still needs a buffer: the marks, which are not written through it.
    struct keel_dispatch d = {
        .shader = &keel_sh_rows_project, .spec = { reduce_lanes(rec), p->mode }, .n_spec = 2,
        .bind = { UPDATE(p->x), READ(p->u), READ(p->marks), READ(p->marks) }, .n_bind = 4, .push = &pc, .push_bytes = sizeof pc,
        .groups = { p->n_rows, 1, 1 }, .flops = 4 * n * p->k, .bytes = 8 * n, .label = "rows_project" };
    if (limit) {
        d.bind[3] = (struct keel_bind)WRITE(p->factor);
    }
    keel_record(rec, &d);
}

static void dot(keel_recorder *rec, struct keel_span x, struct keel_span u, struct keel_span y, uint32_t n_rows, uint32_t k,
                uint32_t width, bool square)
{
    const uint64_t n = (uint64_t)n_rows * width * k;
    const struct rows_pc pc = { .width = width, .k = k };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_rows_dot, .spec = { reduce_lanes(rec), square }, .n_spec = 2, .bind = { READ(x), READ(u), WRITE(y) }, .n_bind = 3,
        .push = &pc, .push_bytes = sizeof pc, .groups = { k, n_rows, 1 }, .flops = 2 * n, .bytes = 4 * n, .label = "rows_dot" });
}

void keel_rows_dot(keel_recorder *rec, struct keel_span x, struct keel_span u, struct keel_span y, uint32_t n_rows, uint32_t k,
                   uint32_t width)
{
    dot(rec, x, u, y, n_rows, k, width, false);
}

void keel_rows_square(keel_recorder *rec, struct keel_span x, struct keel_span y, uint32_t n_rows, uint32_t width)
{
    dot(rec, x, x, y, n_rows, 1, width, true);
}

void keel_rows_sums(keel_recorder *rec, const struct keel_rows_sums_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct rows_pc pc = { .n_rows = p->n_rows, .width = p->width };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_rows_sums, .spec = { LANES }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->marks), READ(p->shift), UPDATE(p->sums) }, .n_bind = 4, .push = &pc, .push_bytes = sizeof pc,
        .groups = { keel_div_up(p->width, LANES), 1, 1 }, .flops = 8 * n, .bytes = 4 * n, .label = "rows_sums" });
}

void keel_rows_cov(keel_recorder *rec, const struct keel_rows_sums_params *p)
{
    const uint64_t row = 4ull * p->n_rows * p->width; // operations for one row of the matrix
    for (uint32_t i = 0; i < p->width;) {
        const uint32_t m = units_per_dispatch(rec, "rows_cov", p->width - i, row, 4);
        const struct rows_pc pc = { .n_rows = p->n_rows, .width = p->width, .row0 = i };
        keel_record(rec, &(struct keel_dispatch){
            .shader = &keel_sh_rows_cov, .spec = { LANES }, .n_spec = 1,
            .bind = { READ(p->x), READ(p->marks), READ(p->shift), UPDATE(p->sums) }, .n_bind = 4, .push = &pc,
            .push_bytes = sizeof pc, .groups = { keel_div_up(p->width, LANES), keel_div_up(m, 4), 1 }, .flops = m * row,
            .bytes = 8ull * m * p->width, .label = "rows_cov" });
        i += m;
    }
}

void keel_rows_pool(keel_recorder *rec, const struct keel_rows_pool_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct rows_pc pc = { .width = p->width };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_rows_pool, .spec = { LANES }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->marks), READ(p->segments), WRITE(p->y) }, .n_bind = 4, .push = &pc, .push_bytes = sizeof pc,
        .groups = { keel_div_up(p->width, LANES), p->n_segments, 1 }, .flops = 2 * n, .bytes = 4 * n, .label = "rows_pool" });
}
