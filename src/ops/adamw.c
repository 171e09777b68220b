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

void keel_sumsq(keel_recorder *rec, struct keel_span x, struct keel_span partial, struct keel_span sums, uint64_t n)
{
    const struct sumsq_pc pc = { .n = (uint32_t)n };
    const uint32_t parts = (uint32_t)(keel_sumsq_scratch(n) / 4);
    const struct sumsq_pc pc2 = { .n = parts };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_sumsq, .spec = { LANES, true }, .n_spec = 2, .bind = { READ(x), WRITE(partial) }, .n_bind = 2,
        .push = &pc, .push_bytes = sizeof pc, .groups = { parts, 1, 1 }, .flops = 2 * n, .bytes = 4 * n, .label = "sumsq" });
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_sumsq, .spec = { LANES, false }, .n_spec = 2, .bind = { READ(partial), WRITE(sums) }, .n_bind = 2,
        .push = &pc2, .push_bytes = sizeof pc2, .groups = { 1, 1, 1 }, .flops = parts, .bytes = 4ull * parts, .label = "sumsq" });
}

void keel_adamw(keel_recorder *rec, const struct keel_adamw_params *p)
{
    const struct adamw_pc pc = {
        .n = (uint32_t)p->n, .lr = p->lr, .beta1 = p->beta1, .beta2 = p->beta2, .eps = p->eps,
        .weight_decay = p->weight_decay, .clip = p->clip, .bias1 = p->bias1, .sqrt_bias2 = sqrtf(p->bias2),
    };
    struct keel_dispatch d = {
        .shader = &keel_sh_adamw, .spec = { LANES }, .n_spec = 1,
        .bind = { UPDATE(p->w), UPDATE(p->g), UPDATE(p->m), UPDATE(p->v), READ(p->sums) }, .n_bind = 5,
        .push = &pc, .push_bytes = sizeof pc, .flops = 15 * p->n, .bytes = 32 * p->n, .label = "adamw" };
    fold_groups(rec, (p->n + LANES - 1) / LANES, d.groups);
    keel_record(rec, &d);
}
