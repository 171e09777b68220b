// SPDX-License-Identifier: MIT
// train/loop.c: the training run: checks, plan, optimiser steps, log, states, the finished adapter;
// conversion of adapters.
//
// Everything random is a function of the seed and a position, and a state holds parameters and moments bit
// for bit, so that a stopped and resumed run ends with the same bytes as one that never stopped.
#include "checkpoint.h"
#include "data.h"
#include "models.h"
#include "platform.h"

#include <jansson.h>

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define MAX_OPTIONS 32
#define OPTION_TEXT 1024

struct run {
    keel_model *model;
    keel_device *dev;
    const keel_log *log;
    const struct keel_train_params *p;
    struct keel_train_set set;
    struct keel_row_order order;
    enum keel_schedule schedule;
    uint32_t targets;
    uint64_t images_hash; // 0: no images
    float alpha;
    uint64_t n_steps, per_step, all_rows; // rows of a full step; rows of the whole run
    char *state_dir, *state_path;
    FILE *log_file;
    keel_adapter *adapter;
    keel_adapter *frozen[KEEL_MAX_FROZEN];
    keel_trainer *trainer;
    keel_image_trainer *tower; // NULL unless the vision tower is trained too
    keel_heap *heap;
    keel_recorder *rec;
    struct keel_span grads, sums, partial;
    struct keel_train_state state;
    struct keel_pair option[MAX_OPTIONS];
    char option_text[MAX_OPTIONS][OPTION_TEXT];
    struct keel_seq *seqs; // [per_step]
};

// --- checks --------------------------------------------------------------------------------------

static keel_status check_numbers(const struct keel_train_params *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct {
        bool ok;
        const char *what;
    } check[] = {
        { p->data && p->n_data > 0, "--data: at least one file is needed" },
        { p->out && p->out[0], "--out: the adapter to write is needed (FILE.gguf, or a folder for PEFT)" },
        { p->rank >= 1 && p->rank <= 1024, "--rank must be 1 to 1024" },
        { isfinite(p->alpha) && p->alpha >= 0, "--alpha must be above 0 (0: twice the rank)" },
        { p->targets && p->targets[0], "--targets: names of projections, or \"all\"" },
        { isfinite(p->lr) && p->lr >= 0, "--lr must be a number of at least 0" },
        { p->batch >= 1 && p->batch <= 65536, "--batch must be 1 to 65536" },
        { p->accum >= 1 && p->accum <= 65536, "--accum must be 1 to 65536" },
        { p->steps > 0 || (isfinite(p->epochs) && p->epochs > 0 && p->epochs <= 1e6),
          "--epochs must be above 0, or --steps given" },
        { p->steps < (1ull << 40), "--steps is too large" },
        { p->seq_len >= 2, "--seq-len must be at least 2" },
        { p->beta1 >= 0 && p->beta1 < 1, "--beta1 must be in [0, 1)" },
        { p->beta2 >= 0 && p->beta2 < 1, "--beta2 must be in [0, 1)" },
        { isfinite(p->eps) && p->eps > 0, "--eps must be above 0" },
        { isfinite(p->weight_decay) && p->weight_decay >= 0, "--weight-decay must be at least 0" },
        { isfinite(p->grad_clip) && p->grad_clip >= 0, "--grad-clip must be at least 0 (0: off)" },
    };
    for (size_t i = 0; i < KEEL_COUNT(check); i++) {
        if (!check[i].ok) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "%s", check[i].what);
        }
    }
    for (size_t i = 0; i < p->n_data; i++) {
        if (!p->data[i].path || !isfinite(p->data[i].weight) || p->data[i].weight <= 0) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "--data %s: its weight must be above 0",
                      p->data[i].path ? p->data[i].path : "(none)");
        }
    }
out:
    return st;
}

static keel_status check_params(struct run *r)
{
    const struct keel_train_params *p = r->p;
    const uint32_t context = keel_model_info(r->model)->context;
    keel_status st = KEEL_OK;
    if (!r->dev) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG,
                  "the model must be loaded onto a device before training (keel_model_load)");
    }
    KEEL_TRY(check_numbers(p, r->log));
    if (!p->schedule || !keel_schedule_parse(p->schedule, &r->schedule)) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--schedule %s is unknown; use constant, linear or cosine",
                  p->schedule ? p->schedule : "");
    }
    if (context && p->seq_len > context) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--seq-len %u is above the model's context of %u tokens", p->seq_len,
                  context);
    }
    KEEL_TRY(keel_targets_parse(p->targets, &r->targets, r->log));
    if (p->n_frozen > KEEL_MAX_FROZEN) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--lora: %zu adapters, at most %d can be in force while training; merge some (keel merge)",
                  p->n_frozen, KEEL_MAX_FROZEN);
    }
    if ((r->targets & KEEL_VISION_TARGETS) && !p->images) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--targets %s: the vision tower is not there; give its file with --mmproj", p->targets);
    }
    r->alpha = p->alpha > 0 ? p->alpha : 2.0f * (float)p->rank;
    r->per_step = (uint64_t)p->batch * p->accum;
out:
    return st;
}

static bool ends_with(const char *s, const char *end)
{
    const size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

// Creates and removes a temporary file beside `path`.
static keel_status probe(const char *path, const keel_log *log)
{
    struct keel_file_out file = { 0 };
    keel_status st = keel_file_create(&file, path, log);
    keel_file_abort(&file);
    return st;
}

// A folder that cannot be written is to be found now, not after hours of work.
static keel_status check_outputs(struct run *r)
{
    keel_status st = KEEL_OK;
    const char *out_name = r->p->out;
    struct keel_text dir = { 0 }, state = { 0 }, peft = { 0 };
    const char *slash = strrchr(out_name, '/');
    keel_text_addf(&dir, "%s", r->p->checkpoint ? r->p->checkpoint : out_name);
    while (!r->p->checkpoint && dir.len > 1 && dir.data[dir.len - 1] == '/') {
        dir.data[--dir.len] = '\0';
    }
    if (!r->p->checkpoint) {
        keel_text_addf(&dir, ".state");
    }
    keel_text_addf(&state, "%s/state.safetensors", dir.data ? dir.data : "");
    keel_text_addf(&peft, "%s/adapter_model.safetensors", out_name);
    if (dir.failed || state.failed || peft.failed) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "out of memory for file names");
    }
    if (ends_with(out_name, ".gguf")) {
        if (slash && slash != out_name) {
            struct keel_text parent = { 0 };
            keel_text_add(&parent, out_name, (size_t)(slash - out_name));
            st = parent.failed ? KEEL_ERR_NO_MEMORY : keel_make_dirs(parent.data, r->log);
            keel_text_finish(&parent);
            KEEL_TRY(st);
        }
        if (keel_path_is_dir(out_name)) {
            KEEL_FAIL(r->log, KEEL_ERR_IO, "%s: is a folder; a GGUF adapter is one file", out_name);
        }
        KEEL_TRY(probe(out_name, r->log));
    } else {
        KEEL_TRY(keel_make_dirs(out_name, r->log));
        KEEL_TRY(probe(peft.data, r->log));
    }
    KEEL_TRY(keel_make_dirs(dir.data, r->log));
    KEEL_TRY(probe(state.data, r->log));
    if (r->p->log) {
        KEEL_TRY(probe(r->p->log, r->log));
    }
    r->state_dir = dir.data;
    r->state_path = state.data;
    dir = state = (struct keel_text){ 0 };
out:
    keel_text_finish(&dir);
    keel_text_finish(&state);
    keel_text_finish(&peft);
    return st;
}

static keel_status check_plan(struct run *r)
{
    keel_status st = KEEL_OK;
    const uint64_t tokens = (uint64_t)r->p->batch * r->set.longest,
                   room = keel_device_caps(r->dev)->heap_free;
    struct keel_plan plan;
    struct keel_text table = { 0 };
    if (tokens > UINT32_MAX) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG,
                  "--batch %u rows of up to %u tokens are too many; lower --batch and raise --accum",
                  r->p->batch, r->set.longest);
    }
    const struct keel_plan_params want = { .train_rank = r->p->rank,
                                           .train_tokens = (uint32_t)tokens,
                                           .train_row = r->set.longest,
                                           .images = r->p->images != NULL,
                                           .targets = r->p->targets };
    KEEL_TRY(keel_model_plan(r->model, &want, &plan));
    for (uint32_t i = 0; i < plan.n_rows; i++) {
        keel_text_addf(&table, "\n  %-28s %9.1f MB%s", plan.row[i].what, (double)plan.row[i].bytes / 1e6,
                       plan.row[i].host ? " (host)" : "");
    }
    if (room && plan.device_bytes > room) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY,
                  "training needs %.1f MB of device memory, %.1f MB are free; lower --batch (and raise "
                  "--accum), --rank or the length of "
                  "rows:%s",
                  (double)plan.device_bytes / 1e6, (double)room / 1e6, table.data ? table.data : "");
    }
    KEEL_DEBUG(r->log, "memory plan, %.1f MB on the device:%s", (double)plan.device_bytes / 1e6,
               table.data ? table.data : "");
out:
    keel_text_finish(&table);
    return st;
}

// --- set-up --------------------------------------------------------------------------------------

static void option_add(struct run *r, const char *key, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static void option_add(struct run *r, const char *key, const char *fmt, ...)
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
static void collect_options(struct run *r)
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
    if (p->hooks) {
        option_add(r, "hash of --steer", "%016llx", (unsigned long long)keel_hooks_hash(p->hooks, KEEL_HASH_INIT));
    }
    r->state.options = r->option;
}

// Those that the caller has not encoded; the tower gives its memory back before training takes it.
static keel_status encode_images(struct run *r)
{
    keel_status st = KEEL_OK;
    if (r->p->images) {
        KEEL_TRY(keel_images_encode(r->p->images, r->dev, NULL, NULL));
        r->images_hash = keel_images_hash(r->p->images);
    }
out:
    return st;
}

static keel_status plan_steps(struct run *r)
{
    keel_status st = KEEL_OK;
    if (r->p->steps > 0) {
        r->n_steps = r->p->steps;
        r->all_rows = r->n_steps * r->per_step;
    } else {
        const double rows = ceil((double)r->set.n_rows * r->p->epochs - 1e-9);
        r->all_rows = rows > 1 ? (uint64_t)rows : 1;
        r->n_steps = (r->all_rows + r->per_step - 1) / r->per_step;
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

static keel_status load_initial_adapter(struct run *r)
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
        const bool wanted = (r->targets >> keel_adapter_pair_target(r->model, i)) & 1;
        const uint32_t rank = a->pair[i].rank;
        if (rank != (wanted ? r->p->rank : 0)) {
            char name[64];
            keel_adapter_pair_name(r->model, i, name);
            KEEL_FAIL(r->log, KEEL_ERR_MISMATCH,
                      "%s: its rank for %s is %u, but --rank and --targets ask for %u; give the "
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

static keel_status load_frozen(struct run *r)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < r->p->n_frozen; i++) {
        KEEL_TRY(keel_adapter_load(&r->frozen[i], r->model, r->p->frozen[i].path, r->p->frozen[i].scale));
    }
    keel_trainer_set_frozen(r->trainer, r->frozen, (uint32_t)r->p->n_frozen);
out:
    return st;
}

static keel_status create_buffers(struct run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_state *s = &r->state;
    if (r->p->init_adapter) {
        KEEL_TRY(load_initial_adapter(r));
    } else {
        KEEL_TRY(keel_adapter_create(&r->adapter, r->model, r->p->rank, r->alpha, r->targets, r->p->seed));
    }
    const uint64_t bytes = r->adapter->n_floats * sizeof(float);
    s->dev = r->dev;
    s->log = r->log;
    s->n_floats = r->adapter->n_floats;
    s->tensor[0] = keel_span_sub(r->adapter->params, 0, bytes);
    KEEL_TRY(keel_heap_create(&r->heap, r->dev, KEEL_HEAP_DEVICE, "gradients and moments"));
    // The small ones first: a heap that has grown adds a quarter of itself.
    KEEL_TRY(keel_heap_alloc(r->heap, 256, &r->sums));
    KEEL_TRY(keel_heap_alloc(r->heap, KEEL_MAX(keel_sumsq_scratch(s->n_floats), 256), &r->partial));
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &r->grads));
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &s->tensor[1]));
    KEEL_TRY(keel_heap_alloc(r->heap, bytes, &s->tensor[2]));
    KEEL_TRY(keel_recorder_create(&r->rec, r->dev, &(struct keel_recorder_params){ 0 }));
    keel_record_fill(r->rec, r->grads, 0);
    keel_record_fill(r->rec, s->tensor[1], 0);
    keel_record_fill(r->rec, s->tensor[2], 0);
    KEEL_TRY(keel_recorder_submit(r->rec));
    KEEL_TRY(keel_recorder_wait(r->rec));
    KEEL_TRY(keel_trainer_create(&r->trainer, r->model, r->p->batch * r->set.longest, r->set.longest,
                                 r->p->batch * r->set.most_loss));
    if (r->targets & KEEL_VISION_TARGETS) {
        KEEL_TRY(keel_image_trainer_create(&r->tower, r->model, r->p->images, r->trainer));
    }
    if (r->p->hooks) {
        KEEL_TRY(keel_trainer_set_hooks(r->trainer, r->p->hooks));
    }
    KEEL_TRY(load_frozen(r));
    collect_options(r);
out:
    return st;
}

// Goes on from a state, if asked to and there is one; then opens the log at the same step.
static keel_status start(struct run *r)
{
    keel_status st = KEEL_OK;
    struct keel_train_state *s = &r->state;
    if (r->p->resume && keel_path_exists(r->state_path)) {
        KEEL_TRY(keel_train_state_load(s, r->state_path));
        if (s->step < r->n_steps && s->rows != s->step * r->per_step) {
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

// --- steps ---------------------------------------------------------------------------------------

// Draws the rows of the next step and gives each loss token the weight 1/N of the whole step.
static uint32_t draw_rows(struct run *r, struct keel_step_info *info)
{
    const uint32_t n = (uint32_t)KEEL_MIN(r->per_step, r->all_rows - r->state.rows);
    for (uint32_t i = 0; i < n; i++) {
        const struct keel_train_row *row = &r->set.rows[keel_row_order_next(&r->order)];
        r->seqs[i] =
            (struct keel_seq){ .ids = row->ids, .n = row->n, .first = row->first, .mask = row->mask,
                               .images = row->images, .n_images = row->n_images };
        info->tokens += row->n;
        info->loss_tokens += row->n_loss;
    }
    for (uint32_t i = 0; i < n; i++) {
        r->seqs[i].weight = (float)(1.0 / (double)info->loss_tokens);
    }
    return n;
}

// One optimiser step. INTERRUPTED: stopped between micro-batches, the state is still that of the step before.
static keel_status do_step(struct run *r, struct keel_step_info *info)
{
    keel_status st = KEEL_OK;
    struct keel_train_state *s = &r->state;
    const struct keel_train_params *p = r->p;
    const uint64_t begin = keel_now_ns();
    const uint32_t n_rows = draw_rows(r, info);
    const double step = (double)info->step;
    double nll = 0;
    float sumsq = 0;
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
    }
    keel_sumsq(r->rec, r->grads, r->partial, r->sums, s->n_floats);
    KEEL_TRY(keel_recorder_submit(r->rec));
    KEEL_TRY(keel_recorder_wait(r->rec));
    KEEL_TRY(keel_download(r->dev, &sumsq, r->sums, sizeof sumsq));
    info->loss = nll / (double)info->loss_tokens;
    info->grad_norm = sqrt((double)sumsq);
    if (!isfinite(info->loss) || !isfinite(info->grad_norm)) {
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
    s->rows += n_rows;
    s->tokens += info->tokens;
    s->last_loss = info->loss;
    if (info->step == 1) {
        s->first_loss = info->loss;
    }
out:
    return st;
}

static keel_status log_step(struct run *r, const struct keel_step_info *info)
{
    keel_status st = KEEL_OK;
    json_t *v = NULL;
    if (!r->log_file) {
        return KEEL_OK;
    }
    v = json_pack("{s:I, s:f, s:f, s:f, s:I, s:f}", "step", (json_int_t)info->step, "loss", info->loss, "lr",
                  info->lr, "grad_norm", info->grad_norm, "tokens", (json_int_t)info->tokens, "seconds",
                  info->seconds);
    if (!v || json_dumpf(v, r->log_file, JSON_REAL_PRECISION(9)) != 0 || fputc('\n', r->log_file) == EOF ||
        fflush(r->log_file) != 0) {
        KEEL_FAIL(r->log, KEEL_ERR_IO, "%s: cannot be written: %s", r->p->log, strerror(errno));
    }
out:
    json_decref(v);
    return st;
}

static keel_status save_and_stop(struct run *r)
{
    const keel_status st = keel_train_state_save(&r->state, r->state_path);
    if (st == KEEL_OK) {
        KEEL_INFO(r->log, "stopped after step %llu of %llu; state in %s: go on with --resume",
                  (unsigned long long)r->state.step, (unsigned long long)r->n_steps, r->state_dir);
    }
    return st == KEEL_OK ? KEEL_INTERRUPTED : st;
}

static keel_status run_steps(struct run *r)
{
    keel_status st = KEEL_OK;
    const struct keel_train_params *p = r->p;
    while (r->state.step < r->n_steps) {
        struct keel_step_info info = { .step = r->state.step + 1, .n_steps = r->n_steps };
        info.lr = keel_schedule_lr(r->schedule, p->lr, info.step, p->warmup, r->n_steps);
        st = do_step(r, &info);
        if (st == KEEL_INTERRUPTED) {
            return save_and_stop(r);
        }
        KEEL_TRY(st);
        KEEL_TRY(log_step(r, &info));
        const bool go_on = !p->on_step || p->on_step(p->user, &info);
        if ((!go_on || keel_interrupted()) && info.step < r->n_steps) {
            return save_and_stop(r);
        }
        if (p->save_every && info.step % p->save_every == 0 && info.step < r->n_steps) {
            KEEL_TRY(keel_train_state_save(&r->state, r->state_path));
        }
    }
    KEEL_TRY(keel_adapter_save(r->adapter, r->model, p->out));
    KEEL_TRY(keel_train_state_save(&r->state, r->state_path));
    KEEL_INFO(r->log, "%s: written after %llu steps", p->out, (unsigned long long)r->n_steps);
out:
    return st;
}

static void run_finish(struct run *r)
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
    free(r->seqs);
    free(r->state_dir);
    free(r->state_path);
    free(r);
}

keel_status keel_train(keel_model *model, const struct keel_train_params *params,
                       struct keel_train_result *result)
{
    keel_status st = KEEL_OK;
    const uint64_t begin = keel_now_ns();
    struct run *r = calloc(1, sizeof *r);
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
    KEEL_TRY(check_params(r));
    if (r->targets & KEEL_VISION_TARGETS) {
        keel_model_use_vision(model, keel_images_vision(params->images));
    }
    KEEL_TRY(keel_train_set_load(&r->set, model, params->images, params->data, params->n_data,
                                 params->seq_len, log));
    KEEL_TRY(check_plan(r));
    KEEL_TRY(check_outputs(r));
    KEEL_TRY(plan_steps(r));
    KEEL_TRY(encode_images(r));
    KEEL_TRY(create_buffers(r));
    KEEL_TRY(start(r));
    st = run_steps(r);
    if (result) {
        *result = (struct keel_train_result){ .steps = r->state.step,
                                              .first_loss = r->state.first_loss,
                                              .last_loss = r->state.last_loss,
                                              .tokens = r->state.tokens,
                                              .seconds = (double)(keel_now_ns() - begin) * 1e-9,
                                              .n_rows = r->set.n_rows,
                                              .n_params = r->adapter->n_params,
                                              .data_hash = r->set.hash };
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
