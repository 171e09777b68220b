// SPDX-License-Identifier: MIT
// train/setup.c: from checked options to the first step: steps and rows, buffers, adapters, the state of an earlier part of the run.
#include "platform.h"
#include "run.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static void option_add(struct keel_train_run *r, const char *key, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void option_add(struct keel_train_run *r, const char *key, const char *fmt, ...)
{
    const size_t i = r->state.n_options++;
    va_list args;
    KEEL_ASSERT(i < MAX_OPTIONS);
    va_start(args, fmt);
    vsnprintf(r->option_text[i], OPTION_TEXT, fmt, args);
    va_end(args);
    r->option[i] = (struct keel_pair){ key, r->option_text[i] };
}

// What determines the bits of a run. The number of steps only does where the learning rate depends on it, so
// that a run with a constant rate can be lengthened.
static void collect_options(struct keel_train_run *r)
{
    const struct keel_train_params *p = r->p;
    uint64_t weights = KEEL_HASH_INIT, frozen = KEEL_HASH_INIT;
    for (size_t i = 0; i < p->n_data; i++) {
        weights = keel_hash(weights, &p->data[i].weight, sizeof p->data[i].weight);
    }
    for (size_t i = 0; i < p->n_frozen; i++) {
        frozen = keel_hash(frozen, p->frozen[i].path, strlen(p->frozen[i].path));
        frozen = keel_hash(frozen, &p->frozen[i].scale, sizeof p->frozen[i].scale);
    }
    option_add(r, "model hash", "%016llx", (unsigned long long)keel_model_hash(r->model));
    option_add(r, "data hash", "%016llx", (unsigned long long)r->set.hash);
    option_add(r, "hash of data weights", "%016llx", (unsigned long long)(p->n_data > 1 ? weights : 0));
    option_add(r, "hash of --lora", "%016llx", (unsigned long long)(p->n_frozen > 0 ? frozen : 0));
    if (r->images_hash) {
        option_add(r, "images hash", "%016llx", (unsigned long long)r->images_hash);
    }
    option_add(r, "--rank", "%u", p->rank);
    option_add(r, "--alpha", "%.9g", (double)r->alpha);
    option_add(r, "--targets", "%s", p->targets);
    option_add(r, "--layers", "%s", p->layers ? p->layers : "all");
    option_add(r, "--lr", "%.17g", p->lr);
    option_add(r, "--schedule", "%s", p->schedule);
    option_add(r, "--warmup", "%u", p->warmup);
    if (r->schedule != KEEL_SCHEDULE_CONSTANT) {
        option_add(r, "--steps", "%llu", (unsigned long long)r->n_steps);
    }
    option_add(r, "--batch", "%u", p->batch);
    option_add(r, "--accum", "%u", p->accum);
    option_add(r, "--seed", "%llu", (unsigned long long)p->seed);
    option_add(r, "--no-shuffle", "%s", p->no_shuffle ? "true" : "false");
    option_add(r, "--beta1", "%.17g", p->beta1);
    option_add(r, "--beta2", "%.17g", p->beta2);
    option_add(r, "--eps", "%.17g", p->eps);
    option_add(r, "--weight-decay", "%.17g", p->weight_decay);
    option_add(r, "--grad-clip", "%.17g", p->grad_clip);
    option_add(r, "--init-adapter", "%s", p->init_adapter ? p->init_adapter : "");
    option_add(r, "hash of --steer", "%016llx", (unsigned long long)(p->hooks ? keel_hooks_hash(p->hooks, KEEL_HASH_INIT) : 0));
    const bool lisa = r->lisa.set.n_rows > 0;
    option_add(r, "hash of --lisa-data", "%016llx", (unsigned long long)(lisa ? r->lisa.set.hash : 0));
    option_add(r, "--lisa-steps", "%u,%u of %llu", lisa ? p->lisa_align : 0, lisa ? p->lisa_task : 0,
               (unsigned long long)(lisa ? r->n_steps : 0)); // the first tenth of all steps differs from the others
    option_add(r, "--lisa-rho", "%.17g", lisa ? p->lisa_rho : 0);
    option_add(r, "--constrain", "%.17g,%.17g,%.17g", p->constrain[0], p->constrain[1], p->constrain[2]);
    const bool kl = r->kl.set.n_rows > 0;
    option_add(r, "hash of --kl-data", "%016llx", (unsigned long long)(kl ? r->kl.set.hash : 0));
    option_add(r, "--kl-weight", "%.17g", kl ? p->kl_weight : 0);
    option_add(r, "--kl-rows", "%u", kl ? p->kl_rows : 0);
    r->state.options = r->option;
}

keel_status keel_train_encode_images(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    if (r->p->images) {
        KEEL_TRY(keel_images_encode(r->p->images, r->dev, NULL, NULL));
        r->images_hash = keel_images_hash(r->p->images);
    }
out:
    return st;
}

keel_status keel_train_plan_steps(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    if (r->p->no_steps) {
        r->n_steps = r->all_rows = 0;
    } else if (r->p->steps > 0) {
        r->n_steps = r->p->steps;
        r->all_rows = r->n_steps * r->per_step;
    } else {
        const double rows = ceil((double)r->set.n_rows * r->p->epochs - 1e-9);
        r->all_rows = rows > 1 ? (uint64_t)rows : 1;
        r->n_steps = keel_train_lisa_all(r, (r->all_rows + r->per_step - 1) / r->per_step);
    }
    r->seqs = calloc(r->per_step, sizeof *r->seqs);
    if (!r->seqs) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "out of memory for steps of %llu rows",
                  (unsigned long long)r->per_step);
    }
    KEEL_TRY(keel_row_order_init(&r->order, &r->set, r->p->seed, !r->p->no_shuffle, r->log));
out:
    return st;
}

static keel_status load_initial_adapter(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const char *path = r->p->init_adapter;
    KEEL_TRY(keel_adapter_load(&r->adapter, r->model, path, 1.0f));
    const keel_adapter *a = r->adapter;
    if (a->n_skipped > 0) {
        KEEL_FAIL(r->log, KEEL_ERR_MISMATCH,
                  "%s: changes the vision tower too; give --mmproj and the targets it was trained with", path);
    }
    for (uint32_t i = 0; i < a->n_pairs; i++) {
        const bool wanted = keel_adapter_pair_wanted(r->model, i, r->targets, r->layers);
        const uint32_t rank = a->pair[i].rank;
        if (rank != (wanted ? r->p->rank : 0)) {
            char name[64];
            keel_adapter_pair_name(r->model, i, name);
            KEEL_FAIL(r->log, KEEL_ERR_MISMATCH,
                      "%s: its rank for %s is %u, but --rank, --targets and --layers ask for %u; give the "
                      "options it was trained with",
                      path, name, rank, wanted ? r->p->rank : 0);
        }
    }
    if (r->p->alpha > 0 && a->alpha != r->p->alpha) {
        KEEL_FAIL(r->log, KEEL_ERR_MISMATCH, "%s: its alpha is %g, --alpha is %g; leave --alpha away", path,
                  (double)a->alpha, (double)r->p->alpha);
    }
    r->alpha = a->alpha;
out:
    return st;
}

static keel_status load_frozen(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < r->p->n_frozen; i++) {
        KEEL_TRY(keel_adapter_load(&r->frozen[i], r->model, r->p->frozen[i].path, r->p->frozen[i].scale));
    }
    keel_trainer_set_frozen(r->trainer, r->frozen, (uint32_t)r->p->n_frozen);
out:
    return st;
}

struct keel_seq keel_train_seq(const struct keel_train_row *row, float weight)
{
    return (struct keel_seq){ .ids = row->ids, .n = row->n, .first = row->first, .mask = row->mask, .weight = weight,
                              .images = row->images, .n_images = row->n_images };
}

keel_status keel_train_each_batch(struct keel_train_run *r, const struct keel_train_set *set, keel_train_batch_fn *fn)
{
    keel_status st = KEEL_OK;
    struct keel_seq *seqs = calloc(r->p->batch, sizeof *seqs);
    if (!seqs) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "out of memory for batches of %u rows", r->p->batch);
    }
    for (uint64_t at = 0; at < set->n_rows; at += r->p->batch) {
        const uint32_t n = (uint32_t)KEEL_MIN(r->p->batch, set->n_rows - at);
        for (uint32_t i = 0; i < n; i++) {
            seqs[i] = keel_train_seq(&set->rows[at + i], 0);
        }
        KEEL_TRY(fn(r, &set->rows[at], seqs, n));
    }
out:
    free(seqs);
    return st;
}

uint32_t keel_train_longest(const struct keel_train_run *r)
{
    return KEEL_MAX(KEEL_MAX(r->set.longest, r->monitor.set.longest), KEEL_MAX(r->kl.set.longest, r->lisa.set.longest));
}

uint32_t keel_train_most_loss(const struct keel_train_run *r)
{
    return KEEL_MAX(KEEL_MAX(r->set.most_loss, r->monitor.set.most_loss), KEEL_MAX(r->kl.set.most_loss, r->lisa.set.most_loss));
}

// What mitigations need to know of the base.
static keel_status prepare(struct keel_train_run *r)
{
    const uint64_t begin = keel_now_ns();
    keel_status st = keel_train_constrain_prepare(r);
    if (st == KEEL_OK) {
        st = keel_train_kl_prepare(r);
    }
    if (st == KEEL_OK) {
        st = keel_train_monitor_prepare(r);
    }
    r->prepare_seconds = (double)(keel_now_ns() - begin) * 1e-9;
    return st;
}

keel_status keel_train_create_buffers(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_state *s = &r->state;
    if (r->p->init_adapter) {
        KEEL_TRY(load_initial_adapter(r));
    } else {
        KEEL_TRY(keel_adapter_create(&r->adapter, r->model, r->p->rank, r->alpha, r->targets, r->layers, r->p->seed));
    }
    const uint64_t bytes = r->adapter->n_floats * sizeof(float);
    s->dev = r->dev;
    s->log = r->log;
    s->n_floats = r->adapter->n_floats;
    s->n_tensors = 3;
    s->tensor[0] = keel_span_sub(r->adapter->params, 0, bytes);
    KEEL_TRY(keel_heap_create(&r->heap, r->dev, KEEL_HEAP_DEVICE, "gradients and moments"));
    // The small ones first: a heap that has grown adds a quarter of itself.
    KEEL_TRY(keel_heap_alloc(r->heap, 256, &r->sums));
    KEEL_TRY(keel_heap_alloc(r->heap, KEEL_MAX(keel_sumsq_scratch(s->n_floats), 256), &r->partial));
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &r->grads));
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &s->tensor[1]));
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &s->tensor[2]));
    KEEL_TRY(keel_train_lisa_buffers(r));
    KEEL_TRY(keel_recorder_create(&r->rec, r->dev, &(struct keel_recorder_params){ 0 }));
    keel_record_fill(r->rec, r->grads, 0);
    keel_record_fill(r->rec, s->tensor[1], 0);
    keel_record_fill(r->rec, s->tensor[2], 0);
    KEEL_TRY(keel_recorder_submit(r->rec));
    KEEL_TRY(keel_recorder_wait(r->rec));
    KEEL_TRY(keel_trainer_create(&r->trainer, r->model, r->p->batch * keel_train_longest(r),
                                 keel_train_longest(r), r->p->batch * keel_train_most_loss(r)));
    KEEL_TRY(prepare(r));
    if (r->targets & KEEL_VISION_TARGETS) {
        KEEL_TRY(keel_image_trainer_create(&r->tower, r->model, r->p->images, r->trainer));
    }
    KEEL_TRY(keel_trainer_set_hooks(r->trainer, r->p->hooks));
    KEEL_TRY(load_frozen(r));
    collect_options(r);
out:
    return st;
}

keel_status keel_train_start(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_state *s = &r->state;
    if (r->p->resume && keel_path_exists(r->state_path)) {
        KEEL_TRY(keel_train_state_load(s, r->state_path));
        const uint64_t data_steps = s->step - keel_train_lisa_count(r, s->step);
        if (s->step < r->n_steps && s->rows != data_steps * r->per_step) {
            KEEL_FAIL(r->log, KEEL_ERR_MISMATCH,
                      "%s: that run ended with a part of a step, so it cannot be lengthened; use its adapter "
                      "with --init-adapter",
                      r->state_path);
        }
        if (s->step > r->n_steps) {
            KEEL_FAIL(r->log, KEEL_ERR_MISMATCH, "%s: is at step %llu, beyond the %llu steps asked for",
                      r->state_path, (unsigned long long)s->step, (unsigned long long)r->n_steps);
        }
        for (uint64_t i = 0; i < s->rows; i++) {
            keel_row_order_next(&r->order);
        }
        keel_train_lisa_skip(r, s->step);
        keel_train_kl_skip(r, s->step);
        KEEL_INFO(r->log, "%s: going on after step %llu of %llu", r->state_path, (unsigned long long)s->step,
                  (unsigned long long)r->n_steps);
    }
    if (r->p->log) {
        if (s->step > 0) {
            KEEL_TRY(keel_train_log_cut(r->p->log, s->step, r->log));
        }
        r->log_file = fopen(r->p->log, s->step > 0 ? "abe" : "wbe");
        if (!r->log_file) {
            KEEL_FAIL(r->log, KEEL_ERR_IO, "%s: cannot be written: %s", r->p->log, strerror(errno));
        }
    }
out:
    return st;
}
