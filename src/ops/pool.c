// SPDX-License-Identifier: MIT
// ops/pool.c: averages over squares of a grid of rows, and their backward.
#include "ops_internal.h"

#include "pool/pool.h"

static_assert(sizeof(struct pool_pc) == 16, "shaders/pool/pool.h");

static void record_pool(keel_recorder *rec, const struct keel_pool_params *p, bool bwd)
{
    const struct pool_pc pc = { .grid = p->grid, .kernel = p->kernel, .side = p->grid / p->kernel, .width = p->width };
    const uint32_t rows = bwd ? p->grid * p->grid : pc.side * pc.side;
    const uint64_t n = (uint64_t)p->grid * p->grid * p->width;
    keel_record(rec, &(struct keel_dispatch){
        .shader = bwd ? &keel_sh_pool_bwd : &keel_sh_pool_fwd, .spec = { LANES }, .n_spec = 1,
        .bind = { READ(p->x), WRITE(p->y) }, .n_bind = 2, .push = &pc, .push_bytes = sizeof pc,
        .groups = { keel_div_up(p->width, LANES), rows, 1 }, .flops = n, .bytes = 8 * n, .label = bwd ? "pool_bwd" : "pool" });
}

void keel_pool(keel_recorder *rec, const struct keel_pool_params *p)
{
    record_pool(rec, p, false);
}

void keel_pool_bwd(keel_recorder *rec, const struct keel_pool_params *p)
{
    record_pool(rec, p, true);
}
