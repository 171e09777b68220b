// SPDX-License-Identifier: MIT
// train/loop.c: the training run: optimiser steps, log, states, the finished adapter; conversion of adapters.
//
// Everything random is a function of the seed and a position, and a state holds parameters and moments bit
// for bit, so that a stopped and resumed run ends with the same bytes as one that never stopped.
#include "platform.h"
#include "run.h"

#include <jansson.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

// --- steps ---------------------------------------------------------------------------------------

// Draws the rows of the next step and gives each loss token the weight 1/N of the whole step.
static uint32_t draw_rows(struct keel_train_run *r, struct keel_step_info *info)
{
    const bool align = keel_train_lisa_aligns(r, info->step);
    const uint32_t n = (uint32_t)(align ? r->per_step : KEEL_MIN(r->per_step, r->all_rows - r->state.rows));
    struct keel_row_order *order = align ? &r->lisa.order : &r->order;
    for (uint32_t i = 0; i < n; i++) {
        const struct keel_train_row *row = &order->set->rows[keel_row_order_next(order)];
        r->seqs[i] = keel_train_seq(row, 0);
        if (r->constrain.beta && !align) {
            r->seqs[i].beta = r->constrain.beta + row->place0;
            r->seqs[i].base_logprob = r->constrain.base_logprob + row->place0;
        }
        info->tokens += row->n;
        info->loss_tokens += row->n_loss;
    }
    for (uint32_t i = 0; i < n; i++) {
        r->seqs[i].weight = (float)(1.0 / (double)info->loss_tokens);
    }
    return n;
}

// One optimiser step. INTERRUPTED: stopped between micro-batches, the state is still that of the step before.
static keel_status do_step(struct keel_train_run *r, struct keel_step_info *info)
{
    keel_status st = KEEL_OK;
    struct keel_train_state *s = &r->state;
    const struct keel_train_params *p = r->p;
    const uint64_t begin = keel_now_ns();
    const uint32_t n_rows = draw_rows(r, info);
    const double step = (double)info->step;
    double nll = 0;
    float sumsq = 0;
    keel_trainer_set_step(r->trainer, s->step);
    KEEL_TRY(keel_train_lisa_turn(r, info->step));
    for (uint32_t at = 0; at < n_rows; at += p->batch) {
        double part = 0;
        uint64_t n_loss = 0;
        if (keel_interrupted()) {
            return KEEL_INTERRUPTED;
        }
        const uint32_t n = KEEL_MIN(p->batch, n_rows - at);
        if (r->tower) {
            KEEL_TRY(keel_image_trainer_forward(r->tower, r->adapter, r->seqs + at, n));
        }
        KEEL_TRY(keel_trainer_step(r->trainer, r->adapter, r->grads, r->seqs + at, n, &part, &n_loss));
        if (r->tower) {
            KEEL_TRY(keel_image_trainer_backward(r->tower, r->adapter, r->grads, r->seqs + at, n));
        }
        nll += part;
        info->constrained_loss += r->seqs[at].beta ? keel_trainer_weighted(r->trainer) : 0;
    }
    KEEL_TRY(keel_train_lisa_proximal(r, info));
    if (r->kl.set.n_rows > 0) {
        KEEL_TRY(keel_train_kl_step(r, info));
    }
    keel_sumsq(r->rec, r->grads, r->partial, r->sums, s->n_floats);
    KEEL_TRY(keel_recorder_submit(r->rec));
    KEEL_TRY(keel_recorder_wait(r->rec));
    KEEL_TRY(keel_download(r->dev, &sumsq, r->sums, sizeof sumsq));
    info->loss = nll / (double)info->loss_tokens;
    info->grad_norm = sqrt((double)sumsq);
    if (!isfinite(info->loss) || !isfinite(info->grad_norm) || !isfinite(info->kl)) {
        KEEL_FAIL(r->log, KEEL_ERR_NUMERIC,
                  "step %llu: loss %g, gradient norm %g: the update was not applied; lower --lr, or go on "
                  "from the last state in %s",
                  (unsigned long long)info->step, info->loss, info->grad_norm, r->state_dir);
    }
    keel_adamw(r->rec, &(struct keel_adamw_params){ .w = s->tensor[0],
                                                    .g = r->grads,
                                                    .m = s->tensor[1],
                                                    .v = s->tensor[2],
                                                    .sums = r->sums,
                                                    .n = s->n_floats,
                                                    .lr = (float)info->lr,
                                                    .beta1 = (float)p->beta1,
                                                    .beta2 = (float)p->beta2,
                                                    .eps = (float)p->eps,
                                                    .weight_decay = (float)p->weight_decay,
                                                    .clip = (float)p->grad_clip,
                                                    .bias1 = (float)(1.0 - pow(p->beta1, step)),
                                                    .bias2 = (float)(1.0 - pow(p->beta2, step)) });
    KEEL_TRY(keel_recorder_submit(r->rec));
    KEEL_TRY(keel_recorder_wait(r->rec));
    info->seconds = (double)(keel_now_ns() - begin) * 1e-9;
    s->step = info->step;
    s->rows += info->lisa_align ? 0 : n_rows;
    s->tokens += info->tokens;
    s->last_loss = info->loss;
    if (info->step == 1) {
        s->first_loss = info->loss;
    }
out:
    return st;
}

// What the run takes, once: bytes by use.
static json_t *memory_json(const struct keel_plan *plan)
{
    json_t *v = json_object();
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        json_object_set_new(v, plan->row[i].what, json_integer((json_int_t)plan->row[i].bytes));
    }
    return v;
}

static json_t *monitor_json(const double *value, double seconds)
{
    json_t *v = json_object();
    for (size_t i = 0; i < KEEL_N_MONITORED; i++) {
        if (isfinite(value[i])) {
            json_object_set_new(v, keel_monitor_name[i], json_real(value[i]));
        }
    }
    json_object_set_new(v, "seconds", json_real(seconds));
    return v;
}

static keel_status log_step(struct keel_train_run *r, const struct keel_step_info *info)
{
    keel_status st = KEEL_OK;
    json_t *v = NULL;
    if (!r->log_file) {
        return KEEL_OK;
    }
    v = json_pack("{s:I, s:f, s:f, s:f, s:I, s:f}", "step", (json_int_t)info->step, "loss", info->loss, "lr",
                  info->lr, "grad_norm", info->grad_norm, "tokens", (json_int_t)info->tokens, "seconds",
                  info->seconds);
    if (v && r->lisa.set.n_rows > 0) {
        json_object_set_new(v, "phase", json_string(info->lisa_align ? "align" : "task"));
        json_object_set_new(v, "proximal", json_real(info->proximal));
    }
    if (v && r->constrain.beta && !info->lisa_align) {
        json_object_set_new(v, "constrained_loss", json_real(info->constrained_loss));
    }
    if (v && r->kl.set.n_rows > 0) {
        json_object_set_new(v, "kl", json_real(info->kl));
        json_object_set_new(v, "kl_seconds", json_real(info->kl_seconds));
    }
    if (v && info->monitor) {
        json_object_set_new(v, "monitor", monitor_json(info->monitor, r->monitor.seconds));
    }
    if (v && info->step == 1) {
        json_object_set_new(v, "memory", memory_json(&r->plan));
        json_object_set_new(v, "prepare_seconds", json_real(r->prepare_seconds));
    }
    if (!v || json_dumpf(v, r->log_file, JSON_REAL_PRECISION(9)) != 0 || fputc('\n', r->log_file) == EOF ||
        fflush(r->log_file) != 0) {
        KEEL_FAIL(r->log, KEEL_ERR_IO, "%s: cannot be written: %s", r->p->log, strerror(errno));
    }
out:
    json_decref(v);
    return st;
}

static keel_status save_and_stop(struct keel_train_run *r)
{
    const keel_status st = keel_train_state_save(&r->state, r->state_path);
    if (st == KEEL_OK) {
        KEEL_INFO(r->log, "stopped after step %llu of %llu; state in %s: go on with --resume",
                  (unsigned long long)r->state.step, (unsigned long long)r->n_steps, r->state_dir);
    }
    return st == KEEL_OK ? KEEL_INTERRUPTED : st;
}

// Whether the state is due after this step: every --save-every steps, else every few minutes, since a device that is lost takes
// parameters and moments with it.
static bool state_due(const struct keel_train_run *r, uint64_t step, uint64_t saved_ns)
{
    const uint64_t minutes = 5;
    return r->p->save_every ? step % r->p->save_every == 0 : keel_now_ns() - saved_ns > minutes * 60 * 1000000000u;
}

// Says what is left after the device was lost.
static void say_lost(const struct keel_train_run *r, uint64_t saved)
{
    if (saved > 0) {
        KEEL_ERROR(r->log, "the device was lost in step %llu; the state of step %llu is in %s: go on with --resume",
                   (unsigned long long)r->state.step + 1, (unsigned long long)saved, r->state_dir);
    } else {
        KEEL_ERROR(r->log, "the device was lost in step %llu, before a state was saved; start again, with --save-every for states more often",
                   (unsigned long long)r->state.step + 1);
    }
}

static keel_status run_steps(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const struct keel_train_params *p = r->p;
    uint64_t saved = r->state.step, saved_ns = keel_now_ns(); // a run that goes on has its state on disk
    while (r->state.step < r->n_steps) {
        struct keel_step_info info = { .step = r->state.step + 1, .n_steps = r->n_steps };
        info.lr = keel_schedule_lr(r->schedule, p->lr, info.step, p->warmup, r->n_steps);
        st = do_step(r, &info);
        if (st == KEEL_INTERRUPTED) {
            return save_and_stop(r);
        }
        KEEL_TRY(st);
        if (keel_train_monitor_due(r, info.step)) {
            KEEL_TRY(keel_train_monitor_measure(r));
            info.monitor = r->monitor.value;
        }
        KEEL_TRY(log_step(r, &info));
        if (info.monitor) {
            KEEL_TRY(keel_train_guard_check(r));
        }
        const bool go_on = !p->on_step || p->on_step(p->user, &info);
        if (r->breached) {
            break;
        }
        if ((!go_on || keel_interrupted()) && info.step < r->n_steps) {
            return save_and_stop(r);
        }
        if (info.step < r->n_steps && state_due(r, info.step, saved_ns)) {
            KEEL_TRY(keel_train_state_save(&r->state, r->state_path));
            saved = info.step;
            saved_ns = keel_now_ns();
        }
    }
    if (!r->breached || p->on_breach != KEEL_BREACH_FAIL) {
        KEEL_TRY(keel_adapter_save(r->adapter, r->model, p->out));
    }
    KEEL_TRY(keel_train_state_save(&r->state, r->state_path));
    if (r->breached && p->on_breach != KEEL_BREACH_ROLLBACK) {
        return KEEL_OVER_BUDGET;
    }
    KEEL_INFO(r->log, "%s: written, as after %llu steps", p->out, (unsigned long long)r->state.step);
out:
    if (st == KEEL_ERR_DEVICE_LOST) {
        say_lost(r, saved);
    }
    return st;
}

static void run_finish(struct keel_train_run *r)
{
    if (r->log_file) {
        fclose(r->log_file);
    }
    keel_image_trainer_destroy(&r->tower);
    keel_trainer_destroy(&r->trainer);
    keel_recorder_destroy(&r->rec);
    keel_heap_destroy(&r->heap);
    keel_adapter_destroy(&r->adapter);
    for (size_t i = 0; i < KEEL_MAX_FROZEN; i++) {
        keel_adapter_destroy(&r->frozen[i]);
    }
    keel_row_order_finish(&r->order);
    keel_train_set_finish(&r->set);
    keel_train_monitor_finish(&r->monitor);
    keel_train_lisa_finish(&r->lisa);
    keel_train_constrain_finish(&r->constrain);
    keel_train_kl_finish(&r->kl);
    free(r->seqs);
    free(r->layers);
    free(r->state_dir);
    free(r->state_path);
    free(r->good_path);
    free(r);
}

keel_status keel_train(keel_model *model, const struct keel_train_params *params,
                       struct keel_train_result *result)
{
    keel_status st = KEEL_OK;
    const uint64_t begin = keel_now_ns();
    struct keel_train_run *r = calloc(1, sizeof *r);
    keel_device *dev = keel_model_device(model);
    const keel_log *log = dev ? keel_device_log(dev) : NULL;
    if (!r) {
        KEEL_ERROR(log, "out of memory for a training run");
        return KEEL_ERR_NO_MEMORY;
    }
    r->model = model;
    r->dev = dev;
    r->log = log;
    r->p = params;
    KEEL_TRY(keel_train_check_params(r));
    if (r->targets & KEEL_VISION_TARGETS) {
        keel_model_use_vision(model, keel_images_vision(params->images));
    }
    KEEL_TRY(keel_train_set_load(&r->set, model, params->images, params->data, params->n_data,
                                 params->seq_len, log));
    KEEL_TRY(keel_train_lisa_load(r));
    KEEL_TRY(keel_train_kl_load(r));
    KEEL_TRY(keel_train_monitor_load(r));
    KEEL_TRY(keel_train_check_plan(r));
    KEEL_TRY(keel_train_check_outputs(r));
    KEEL_TRY(keel_train_plan_steps(r));
    KEEL_TRY(keel_train_encode_images(r));
    KEEL_TRY(keel_train_create_buffers(r));
    KEEL_TRY(keel_train_start(r));
    KEEL_TRY(keel_train_guard_start(r));
    st = run_steps(r);
    if (result) {
        *result = (struct keel_train_result){ .steps = r->state.step,
                                              .first_loss = r->state.first_loss,
                                              .last_loss = r->state.last_loss,
                                              .tokens = r->state.tokens,
                                              .seconds = (double)(keel_now_ns() - begin) * 1e-9,
                                              .n_rows = r->set.n_rows,
                                              .n_params = r->adapter->n_params,
                                              .data_hash = r->set.hash,
                                              .breached = r->breached,
                                              .breach = r->breach,
                                              .prepare_seconds = r->prepare_seconds };
    }
out:
    keel_model_use_vision(model, NULL);
    run_finish(r);
    return st;
}

keel_status keel_adapter_convert(const keel_model *model, const char *from, const char *to)
{
    keel_status st = KEEL_OK;
    keel_adapter *adapter = NULL;
    if (!keel_model_device(model)) {
        KEEL_FAIL(NULL, KEEL_ERR_ARG,
                  "%s: the model must be loaded onto a device to convert an adapter (keel_model_load)", from);
    }
    // Loading allocates on the model's device and leaves the model itself as it was.
    KEEL_TRY(keel_adapter_load(&adapter, (keel_model *)(uintptr_t)model, from, 1.0f));
    if (adapter->n_skipped > 0) {
        KEEL_FAIL(keel_device_log(keel_model_device(model)), KEEL_ERR_UNSUPPORTED,
                  "%s: changes the vision tower too, which a conversion would lose; train with --out of the "
                  "other kind instead",
                  from);
    }
    KEEL_TRY(keel_adapter_save(adapter, model, to));
out:
    keel_adapter_destroy(&adapter);
    return st;
}
