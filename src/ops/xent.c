// SPDX-License-Identifier: MIT
// ops/xent.c: cross-entropy and Kullback-Leibler divergence over chunks of vocabulary rows. A row is cut into segments, so that
// no lane loops over the whole vocabulary (portability notes 0.1) and few rows still fill a device.
#include "ops_internal.h"

#include "xent/xent.h"

static_assert(sizeof(struct xent_pc) == 12, "shaders/xent/xent.h");

static struct xent_pc pc_of(uint32_t n_rows, uint32_t vocab)
{
    return (struct xent_pc){ .vocab = vocab, .segments = keel_div_up(vocab, XENT_SEGMENT), .n_rows = n_rows };
}

uint64_t keel_xent_scratch(uint32_t n_rows, uint32_t vocab)
{
    return 16ull * n_rows * keel_div_up(vocab, XENT_SEGMENT);
}

void keel_xent(keel_recorder *rec, const struct keel_xent_params *p)
{
    const struct xent_pc pc = pc_of(p->n_rows, p->vocab);
    const uint64_t n = (uint64_t)p->n_rows * p->vocab;
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_xent_partial, .spec = { reduce_lanes(rec) }, .n_spec = 1, .bind = { READ(p->logits), WRITE(p->partial) }, .n_bind = 2,
        .push = &pc, .push_bytes = sizeof pc, .groups = { pc.segments, p->n_rows, 1 },
        .flops = 6 * n, .bytes = 8 * n, .label = "xent" });
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_xent_combine, .spec = { LANES }, .n_spec = 1,
        .bind = { READ(p->logits), READ(p->targets), READ(p->partial), WRITE(p->stats) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { keel_div_up(p->n_rows, LANES), 1, 1 },
        .flops = 8ull * p->n_rows * pc.segments, .bytes = 16ull * p->n_rows * pc.segments, .label = "xent_combine" });
}

void keel_xent_bwd(keel_recorder *rec, const struct keel_xent_bwd_params *p)
{
    const struct xent_pc pc = pc_of(p->n_rows, p->vocab);
    const uint64_t n = (uint64_t)p->n_rows * p->vocab;
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_xent_bwd, .spec = { LANES }, .n_spec = 1,
        .bind = { UPDATE(p->logits), READ(p->targets), READ(p->stats), READ(p->weights) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { pc.segments, p->n_rows, 1 },
        .flops = 4 * n, .bytes = 8 * n, .label = "xent_bwd" });
}

void keel_kl(keel_recorder *rec, const struct keel_kl_params *p)
{
    const struct xent_pc pc = pc_of(p->n_rows, p->vocab);
    const uint64_t n = (uint64_t)p->n_rows * p->vocab;
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_kl_partial, .spec = { reduce_lanes(rec) }, .n_spec = 1,
        .bind = { READ(p->logits_p), READ(p->logits_q), READ(p->stats_p), READ(p->stats_q), WRITE(p->partial) }, .n_bind = 5,
        .push = &pc, .push_bytes = sizeof pc, .groups = { pc.segments, p->n_rows, 1 },
        .flops = 10 * n, .bytes = 8 * n, .label = "kl" });
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_kl_combine, .spec = { LANES }, .n_spec = 1, .bind = { READ(p->partial), WRITE(p->kl) }, .n_bind = 2,
        .push = &pc, .push_bytes = sizeof pc, .groups = { keel_div_up(p->n_rows, LANES), 1, 1 },
        .flops = 2ull * p->n_rows * pc.segments, .bytes = 16ull * p->n_rows * pc.segments, .label = "kl_combine" });
}

void keel_xent_constrain(keel_recorder *rec, struct keel_span stats, struct keel_span beta, struct keel_span base, struct keel_span weights,
                         uint32_t n_rows)
{
    const struct xent_pc pc = { .n_rows = n_rows };
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_constrain, .spec = { LANES }, .n_spec = 1,
        .bind = { READ(stats), READ(beta), READ(base), UPDATE(weights) }, .n_bind = 4,
        .push = &pc, .push_bytes = sizeof pc, .groups = { keel_div_up(n_rows, LANES), 1, 1 },
        .flops = 8ull * n_rows, .bytes = 32ull * n_rows, .label = "constrain" });
}
