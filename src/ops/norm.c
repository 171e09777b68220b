// SPDX-License-Identifier: MIT
// ops/norm.c: RMSNorm and LayerNorm with their backward. Sources: Zhang & Sennrich 2019, eq. 4; Ba et al. 2016.
#include "ops_internal.h"

#include "norm/norm.h"

static_assert(sizeof(struct norm_pc) == 12, "shaders/norm/norm.h");

void keel_rmsnorm(keel_recorder *rec, const struct keel_rmsnorm_params *p)
{
    const bool add = p->residual.bytes != 0;
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct norm_pc pc = { .width = p->width, .eps = p->eps, .flag = add };
    // Without a residual the binding still needs a buffer: x, which is not read through it.
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_rmsnorm_fwd, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->w), READ(add ? p->residual : p->x), UPDATE(p->y) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .flops = 5 * n, .bytes = 4 * n * (add ? 3 : 2), .label = "rmsnorm" });
}

void keel_rmsnorm_pair(keel_recorder *rec, const struct keel_rmsnorm_pair_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct norm_pc pc = { .width = p->width, .eps = p->eps };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_rmsnorm_pair, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->w), READ(p->residual), UPDATE(p->y), READ(p->v), WRITE(p->z) }, .n_bind = 6,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .flops = 10 * n, .bytes = 4 * n * 4, .label = "rmsnorm_pair" });
}

void keel_rmsnorm_bwd(keel_recorder *rec, const struct keel_rmsnorm_bwd_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct norm_pc pc = { .width = p->width, .eps = p->eps, .flag = p->add };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_rmsnorm_bwd, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->w), READ(p->dy), UPDATE(p->dx) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .flops = 10 * n, .bytes = 4 * n * (p->add ? 4 : 3), .label = "rmsnorm_bwd" });
}

void keel_layernorm(keel_recorder *rec, const struct keel_layernorm_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct norm_pc pc = { .width = p->width, .eps = p->eps };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_layernorm_fwd, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->w), READ(p->b), UPDATE(p->y) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .flops = 8 * n, .bytes = 8 * n, .label = "layernorm" });
}

void keel_layernorm_bwd(keel_recorder *rec, const struct keel_layernorm_bwd_params *p)
{
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct norm_pc pc = { .width = p->width, .eps = p->eps, .flag = p->add };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_layernorm_bwd, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->x), READ(p->w), READ(p->dy), UPDATE(p->dx) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .flops = 16 * n, .bytes = 4 * n * (p->add ? 4 : 3), .label = "layernorm_bwd" });
}
