// SPDX-License-Identifier: MIT
// ops/top.c: divergence of vocabulary rows from a distribution that is kept as a short list and a tail. The listed logits are taken
// out of the row first, so that the tail is a sum of its own and not a difference of two numbers near 1.
#include "ops_internal.h"

#include "xent/top.h"

static_assert(sizeof(struct top_pc) == 16 && TOP == KEEL_TOP && TOP == LANES, "shaders/xent/top.h");

static struct top_pc pc_of(const struct keel_top_params *p)
{
    KEEL_ASSERT(p->n_top <= KEEL_TOP);
    return (struct top_pc){ .vocab = p->vocab, .segments = keel_div_up(p->vocab, XENT_SEGMENT), .n_top = p->n_top, .n_rows = p->n_rows };
}

void keel_top_take(keel_recorder *rec, const struct keel_top_params *p)
{
    const struct top_pc pc = pc_of(p);
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_top_take, .spec = { LANES }, .n_spec = 1,
        .bind = { UPDATE(p->logits), READ(p->ids), WRITE(p->top) }, .n_bind = 3,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .bytes = 16ull * p->n_rows * TOP, .label = "top_take" });
    // The row's target is of no interest; the list holds valid ones.
    keel_xent(rec, &(struct keel_xent_params){ .logits = p->logits, .targets = p->ids, .stats = p->stats, .partial = p->partial,
                                               .n_rows = p->n_rows, .vocab = p->vocab });
}

void keel_top_kl(keel_recorder *rec, const struct keel_top_params *p)
{
    const struct top_pc pc = pc_of(p);
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_top_kl, .spec = { LANES }, .n_spec = 1,
        .bind = { UPDATE(p->top), READ(p->log_p), READ(p->tail_log_p), READ(p->weights), UPDATE(p->stats) }, .n_bind = 5,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .flops = 200ull * p->n_rows * TOP, .bytes = 12ull * p->n_rows * TOP, .label = "top_kl" });
}

void keel_top_bwd(keel_recorder *rec, const struct keel_top_params *p)
{
    const struct top_pc pc = pc_of(p);
    const uint64_t n = (uint64_t)p->n_rows * p->vocab;
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_top_bwd, .spec = { LANES }, .n_spec = 1,
        .bind = { UPDATE(p->logits), READ(p->stats), READ(p->weights) }, .n_bind = 3,
        .push = &pc, .push_bytes = sizeof pc, .groups = { pc.segments, p->n_rows, 1 },
        .flops = 5 * n, .bytes = 8 * n, .label = "top_bwd" });
    keel_record(rec, &(struct keel_dispatch){
        .shader = &keel_sh_top_put, .spec = { LANES }, .n_spec = 1,
        .bind = { UPDATE(p->logits), READ(p->ids), READ(p->top) }, .n_bind = 3,
        .push = &pc, .push_bytes = sizeof pc, .groups = { p->n_rows, 1, 1 },
        .bytes = 12ull * p->n_rows * TOP, .label = "top_put" });
}
