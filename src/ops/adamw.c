// SPDX-License-Identifier: MIT
// ops/adamw.c: gradient norm and the AdamW step. Source: Loshchilov & Hutter 2019; torch.optim.AdamW for the order of operations.
#include "ops_internal.h"

#include "adamw/adamw.h"

#include <math.h>

static_assert(sizeof(struct adamw_pc) == 36, "shaders/adamw/adamw.h");

uint64_t keel_sumsq_scratch(uint64_t n)
{
    return 4 * ((n + SUMSQ_SEGMENT - 1) / SUMSQ_SEGMENT);
}

// Elements that one dispatch may bind, a multiple of 64 segments so that all parts begin on 256-byte borders.
static uint64_t elems_per_dispatch(const keel_recorder *rec)
{
    const uint64_t step = 64 * SUMSQ_SEGMENT;
    const uint64_t most = keel_device_caps(keel_recorder_device(rec))->max_range / 4;
    return KEEL_MAX(most / step, UINT64_C(1)) * step;
}

static struct keel_span part_of(struct keel_span s, uint64_t first, uint64_t n)
{
    return keel_span_sub(s, 4 * first, 4 * n);
}

void keel_sumsq(keel_recorder *rec, struct keel_span x, struct keel_span partial, struct keel_span sums, uint64_t n)
{
    const uint64_t step = elems_per_dispatch(rec);
    const struct sumsq_pc all = { .n = (uint32_t)(keel_sumsq_scratch(n) / 4) };
    for (uint64_t i = 0; i < n; i += step) {
        const uint64_t m = KEEL_MIN(step, n - i);
        const struct sumsq_pc pc = { .n = (uint32_t)m };
        const uint32_t parts = (uint32_t)(keel_sumsq_scratch(m) / 4);
        keel_record(rec, &(struct keel_dispatch){
            .shader = &keel_sh_sumsq, .spec = { reduce_lanes(rec), true }, .n_spec = 2,
            .bind = { READ(part_of(x, i, m)), WRITE(part_of(partial, i / SUMSQ_SEGMENT, parts)) }, .n_bind = 2,
            .push = &pc, .push_bytes = sizeof pc, .groups = { parts, 1, 1 }, .flops = 2 * m, .bytes = 4 * m, .label = "sumsq" });
    }
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_sumsq, .spec = { reduce_lanes(rec), false }, .n_spec = 2, .bind = { READ(partial), WRITE(sums) }, .n_bind = 2,
        .push = &all, .push_bytes = sizeof all, .groups = { 1, 1, 1 }, .flops = all.n, .bytes = 4ull * all.n, .label = "sumsq" });
}

void keel_adamw(keel_recorder *rec, const struct keel_adamw_params *p)
{
    const uint64_t step = elems_per_dispatch(rec);
    for (uint64_t i = 0; i < p->n; i += step) {
        const uint64_t m = KEEL_MIN(step, p->n - i);
        const struct adamw_pc pc = {
            .n = (uint32_t)m, .lr = p->lr, .beta1 = p->beta1, .beta2 = p->beta2, .eps = p->eps,
            .weight_decay = p->weight_decay, .clip = p->clip, .bias1 = p->bias1, .sqrt_bias2 = sqrtf(p->bias2),
        };
        struct keel_dispatch d = {
            .shader = &keel_sh_adamw, .spec = { LANES }, .n_spec = 1,
            .bind = { UPDATE(part_of(p->w, i, m)), UPDATE(part_of(p->g, i, m)), UPDATE(part_of(p->m, i, m)),
                      UPDATE(part_of(p->v, i, m)), READ(p->sums) },
            .n_bind = 5, .push = &pc, .push_bytes = sizeof pc, .flops = 15 * m, .bytes = 32 * m, .label = "adamw" };
        fold_groups(rec, (m + LANES - 1) / LANES, d.groups);
        keel_record(rec, &d);
    }
}
