// SPDX-License-Identifier: MIT
// ops/ewise.c: element-wise ops, biases and moves of rows.
#include "ops_internal.h"

#include "ewise/ewise.h"

static_assert(sizeof(struct ewise_pc) == 12, "shaders/ewise/ewise.h");

void keel_geglu(keel_recorder *rec, struct keel_span gate, struct keel_span up, struct keel_span y, uint64_t n)
{
    const struct ewise_pc pc = { .n = (uint32_t)n };
    struct keel_dispatch d = { .shader = &keel_sh_geglu, .spec = { LANES }, .n_spec = 1,
                               .bind = { READ(gate), READ(up), WRITE(y) }, .n_bind = 3, .push = &pc, .push_bytes = sizeof pc,
                               .flops = 10 * n, .bytes = 12 * n, .label = "geglu" };
    fold_groups(rec, (n + LANES - 1) / LANES, d.groups);
    keel_record(rec, &d);
}

void keel_geglu_bwd(keel_recorder *rec, const struct keel_geglu_bwd_params *p)
{
    const struct ewise_pc pc = { .n = (uint32_t)p->n };
    struct keel_dispatch d = { .shader = &keel_sh_geglu_bwd, .spec = { LANES }, .n_spec = 1,
                               .bind = { READ(p->gate), READ(p->up), READ(p->dy), WRITE(p->d_gate), WRITE(p->d_up) }, .n_bind = 5,
                               .push = &pc, .push_bytes = sizeof pc, .flops = 20 * p->n, .bytes = 20 * p->n, .label = "geglu_bwd" };
    fold_groups(rec, (p->n + LANES - 1) / LANES, d.groups);
    keel_record(rec, &d);
}

void keel_gelu(keel_recorder *rec, struct keel_span x, struct keel_span y, uint64_t n)
{
    const struct ewise_pc pc = { .n = (uint32_t)n };
    struct keel_dispatch d = { .shader = &keel_sh_gelu, .spec = { LANES }, .n_spec = 1, .bind = { READ(x), WRITE(y) }, .n_bind = 2,
                               .push = &pc, .push_bytes = sizeof pc, .flops = 10 * n, .bytes = 8 * n, .label = "gelu" };
    fold_groups(rec, (n + LANES - 1) / LANES, d.groups);
    keel_record(rec, &d);
}

void keel_gelu_bwd(keel_recorder *rec, struct keel_span x, struct keel_span dy, struct keel_span dx, uint64_t n)
{
    const struct ewise_pc pc = { .n = (uint32_t)n };
    struct keel_dispatch d = { .shader = &keel_sh_gelu_bwd, .spec = { LANES }, .n_spec = 1,
                               .bind = { READ(x), READ(dy), WRITE(dx) }, .n_bind = 3, .push = &pc, .push_bytes = sizeof pc,
                               .flops = 15 * n, .bytes = 12 * n, .label = "gelu_bwd" };
    fold_groups(rec, (n + LANES - 1) / LANES, d.groups);
    keel_record(rec, &d);
}

void keel_bias(keel_recorder *rec, const struct keel_bias_params *p)
{
    const bool add = p->residual.bytes != 0;
    const uint64_t n = (uint64_t)p->n_rows * p->width;
    const struct ewise_pc pc = { .width = p->width };
    // Without a residual the binding still needs a buffer: x, which is not read through it.
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_bias, .spec = { LANES, add }, .n_spec = 2,
        .bind = { READ(p->x), READ(p->b), READ(add ? p->residual : p->x), WRITE(p->y) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { keel_div_up(p->width, LANES), p->n_rows, 1 },
        .flops = n * (add ? 2 : 1), .bytes = 4 * n * (add ? 3 : 2), .label = "bias" });
}

void keel_axpy(keel_recorder *rec, float a, struct keel_span x, struct keel_span y, uint64_t n)
{
    const struct ewise_pc pc = { .n = (uint32_t)n, .a = a };
    struct keel_dispatch d = { .shader = &keel_sh_axpy, .spec = { LANES }, .n_spec = 1, .bind = { READ(x), UPDATE(y) }, .n_bind = 2,
                               .push = &pc, .push_bytes = sizeof pc, .flops = 2 * n, .bytes = 12 * n, .label = "axpy" };
    fold_groups(rec, (n + LANES - 1) / LANES, d.groups);
    keel_record(rec, &d);
}

static void move_rows(keel_recorder *rec, struct keel_span x, struct keel_span index, struct keel_span y, uint32_t n_rows,
                      uint32_t width, bool scatter)
{
    const struct ewise_pc pc = { .width = width };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_move_rows, .spec = { LANES, scatter }, .n_spec = 2,
        .bind = { READ(x), READ(index), UPDATE(y) }, .n_bind = 3, .push = &pc, .push_bytes = sizeof pc,
        .groups = { keel_div_up(width, LANES), n_rows, 1 }, .bytes = 8ull * n_rows * width,
        .label = scatter ? "scatter_rows" : "gather_rows" });
}

void keel_gather_rows(keel_recorder *rec, struct keel_span x, struct keel_span index, struct keel_span y, uint32_t n_rows,
                      uint32_t width)
{
    move_rows(rec, x, index, y, n_rows, width, false);
}

void keel_scatter_rows(keel_recorder *rec, struct keel_span x, struct keel_span index, struct keel_span y, uint32_t n_rows,
                       uint32_t width)
{
    move_rows(rec, x, index, y, n_rows, width, true);
}
