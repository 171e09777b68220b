// SPDX-License-Identifier: MIT
// train/kl.c: divergence from the base on rows of its own, beside the loss: L + λ KL(base ‖ adapted) (arXiv 2602.07852;
// science notes 2.2, 2.3). Owns the rows, their order and what the base predicts on them.
#include "platform.h"
#include "run.h"

#include <stdlib.h>

// Rows of this file are not dealt like those of the data.
#define KL_SEED UINT64_C(0x6b6c)

keel_status keel_train_kl_load(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const struct keel_train_params *p = r->p;
    const struct keel_train_data data = { p->kl_data, 1 };
    struct keel_train_kl *kl = &r->kl;
    if (!p->kl_data) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_train_set_load(&kl->set, r->model, p->images, &data, 1, p->seq_len, r->log));
    KEEL_TRY(keel_row_order_init(&kl->order, &kl->set, p->seed ^ KL_SEED, !p->no_shuffle, r->log));
    kl->top = calloc(kl->set.n_loss, sizeof *kl->top);
    kl->seqs = calloc(p->kl_rows, sizeof *kl->seqs);
    if (!kl->top || !kl->seqs) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "%s: no memory for what the base predicts at %llu tokens", p->kl_data,
                  (unsigned long long)kl->set.n_loss);
    }
out:
    return st;
}

static keel_status predict(struct keel_train_run *r, const struct keel_train_row *rows, struct keel_seq *seqs, uint32_t n)
{
    return keel_interrupted() ? KEEL_INTERRUPTED : keel_trainer_top(r->trainer, seqs, n, r->kl.top + rows->place0);
}

keel_status keel_train_kl_prepare(struct keel_train_run *r)
{
    return keel_train_each_batch(r, &r->kl.set, predict);
}

void keel_train_kl_skip(struct keel_train_run *r, uint64_t steps)
{
    for (uint64_t i = 0; r->kl.set.n_rows > 0 && i < steps * r->p->kl_rows; i++) {
        keel_row_order_next(&r->kl.order);
    }
}

static uint64_t draw(struct keel_train_run *r)
{
    struct keel_train_kl *kl = &r->kl;
    uint64_t n_loss = 0;
    for (uint32_t i = 0; i < r->p->kl_rows; i++) {
        const struct keel_train_row *row = &kl->set.rows[keel_row_order_next(&kl->order)];
        kl->seqs[i] = keel_train_seq(row, 0);
        kl->seqs[i].top = kl->top + row->place0;
        n_loss += row->n_loss;
    }
    for (uint32_t i = 0; i < r->p->kl_rows; i++) {
        kl->seqs[i].weight = (float)(r->p->kl_weight / (double)n_loss);
    }
    return n_loss;
}

keel_status keel_train_kl_step(struct keel_train_run *r, struct keel_step_info *info)
{
    keel_status st = KEEL_OK;
    const uint64_t begin = keel_now_ns(), n_loss = draw(r);
    double sum = 0;
    for (uint32_t at = 0; at < r->p->kl_rows; at += r->p->batch) {
        const uint32_t n = KEEL_MIN(r->p->batch, r->p->kl_rows - at);
        struct keel_seq *seqs = r->kl.seqs + at;
        double part;
        uint64_t places;
        if (keel_interrupted()) {
            return KEEL_INTERRUPTED;
        }
        if (r->tower) {
            KEEL_TRY(keel_image_trainer_forward(r->tower, r->adapter, seqs, n));
        }
        KEEL_TRY(keel_trainer_kl_step(r->trainer, r->adapter, r->grads, seqs, n, &part, &places));
        if (r->tower) {
            KEEL_TRY(keel_image_trainer_backward(r->tower, r->adapter, r->grads, seqs, n));
        }
        sum += part;
    }
    info->kl = sum / (double)n_loss;
    info->kl_seconds = (double)(keel_now_ns() - begin) * 1e-9;
out:
    return st;
}

void keel_train_kl_finish(struct keel_train_kl *kl)
{
    keel_row_order_finish(&kl->order);
    keel_train_set_finish(&kl->set);
    free(kl->top);
    free(kl->seqs);
    *kl = (struct keel_train_kl){ 0 };
}
