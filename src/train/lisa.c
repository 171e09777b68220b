// SPDX-License-Identifier: MIT
// train/lisa.c: steps on alignment rows and steps on the data in turns, each held near the adapter that the other kind left behind:
// Lisa (Huang et al. 2024, arXiv 2405.18641; hyper-parameters as in git-disl/Lisa: science notes 2.3).
#include "platform.h"
#include "run.h"

#define LISA_SEED UINT64_C(0x6c697361) // rows of this file are not dealt like those of the data
#define FREE_SHARE 0.1                 // of the steps, the first ones, without the proximal term

static bool is_on(const struct keel_train_run *r)
{
    return r->lisa.set.n_rows > 0;
}

keel_status keel_train_lisa_load(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const struct keel_train_params *p = r->p;
    const struct keel_train_data data = { p->lisa_data, 1 };
    struct keel_train_lisa *lisa = &r->lisa;
    if (!p->lisa_data) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_train_set_load(&lisa->set, r->model, p->images, &data, 1, p->seq_len, r->log));
    KEEL_TRY(keel_row_order_init(&lisa->order, &lisa->set, p->seed ^ LISA_SEED, !p->no_shuffle, r->log));
out:
    return st;
}

// --- turns: lisa_align steps on lisa_data, then lisa_task on the data ----------------------------

bool keel_train_lisa_aligns(const struct keel_train_run *r, uint64_t step)
{
    return is_on(r) && (step - 1) % (r->p->lisa_align + r->p->lisa_task) < r->p->lisa_align;
}

uint64_t keel_train_lisa_count(const struct keel_train_run *r, uint64_t step)
{
    const uint64_t turn = (uint64_t)r->p->lisa_align + r->p->lisa_task;
    return !is_on(r) ? 0 : step / turn * r->p->lisa_align + KEEL_MIN(step % turn, r->p->lisa_align);
}

uint64_t keel_train_lisa_all(const struct keel_train_run *r, uint64_t task_steps)
{
    const uint64_t turns = is_on(r) ? (task_steps + r->p->lisa_task - 1) / r->p->lisa_task : 0;
    return task_steps + turns * r->p->lisa_align;
}

void keel_train_lisa_skip(struct keel_train_run *r, uint64_t steps)
{
    for (uint64_t i = 0; is_on(r) && i < keel_train_lisa_count(r, steps) * r->per_step; i++) {
        keel_row_order_next(&r->lisa.order);
    }
}

// --- the proximal term ---------------------------------------------------------------------------

static keel_status submit(struct keel_train_run *r)
{
    const keel_status st = keel_recorder_submit(r->rec);
    return st == KEEL_OK ? keel_recorder_wait(r->rec) : st;
}

keel_status keel_train_lisa_buffers(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_state *s = &r->state;
    const uint64_t bytes = s->n_floats * sizeof(float);
    if (!is_on(r)) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &r->lisa.diff));
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &s->tensor[s->n_tensors++]));
out:
    return st;
}

keel_status keel_train_lisa_turn(struct keel_train_run *r, uint64_t step)
{
    if (!is_on(r) || (step > 1 && keel_train_lisa_aligns(r, step) == keel_train_lisa_aligns(r, step - 1))) {
        return KEEL_OK;
    }
    keel_record_copy(r->rec, r->state.tensor[3], r->state.tensor[0]);
    return submit(r);
}

keel_status keel_train_lisa_proximal(struct keel_train_run *r, struct keel_step_info *info)
{
    keel_status st = KEEL_OK;
    const struct keel_train_state *s = &r->state;
    const float rho = (float)r->p->lisa_rho;
    float sumsq = 0;
    info->lisa_align = keel_train_lisa_aligns(r, info->step);
    if (!is_on(r) || (double)(info->step - 1) < FREE_SHARE * (double)r->n_steps) {
        return KEEL_OK;
    }
    keel_record_copy(r->rec, r->lisa.diff, s->tensor[0]);
    keel_axpy(r->rec, -1.0f, s->tensor[3], r->lisa.diff, s->n_floats);
    keel_axpy(r->rec, rho, r->lisa.diff, r->grads, s->n_floats);
    keel_sumsq(r->rec, r->lisa.diff, r->partial, r->sums, s->n_floats);
    KEEL_TRY(submit(r));
    KEEL_TRY(keel_download(r->dev, &sumsq, r->sums, sizeof sumsq));
    info->proximal = 0.5 * (double)rho * (double)sumsq;
out:
    return st;
}

void keel_train_lisa_finish(struct keel_train_lisa *lisa)
{
    keel_row_order_finish(&lisa->order);
    keel_train_set_finish(&lisa->set);
    *lisa = (struct keel_train_lisa){ 0 };
}
