// SPDX-License-Identifier: MIT
// train/checks.c: what is wrong with a run, found before it starts: options, files to write, memory.
#include "platform.h"
#include "run.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static keel_status check_guard(const struct keel_train_params *p, const keel_log *log)
{
    keel_status st = KEEL_OK;
    if (p->n_guard > 0 && !p->monitor) {
        KEEL_FAIL(log, KEEL_ERR_ARG, "--guard: nothing measures it; give rows with --monitor");
    }
    for (size_t i = 0; i < p->n_guard; i++) {
        if (p->guard[i].metric >= KEEL_N_MONITORED || !isfinite(p->guard[i].limit)) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "--guard: limits are finite numbers, metrics one of the names in keel/train.h");
        }
    }
out:
    return st;
}

static bool in_range(double beta)
{
    return beta >= 0 && beta <= 1000;
}

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
        { !p->monitor || p->monitor_every >= 1, "--monitor-every must be at least 1" },
        { !p->lisa_data || (p->lisa_align >= 1 && p->lisa_task >= 1 && p->lisa_align < (1u << 30) && p->lisa_task < (1u << 30)),
          "--lisa-steps: two numbers of steps, each at least 1" },
        { !p->lisa_data || (isfinite(p->lisa_rho) && p->lisa_rho >= 0), "--lisa-rho must be at least 0" },
        { in_range(p->constrain[0]) && in_range(p->constrain[1]) && in_range(p->constrain[2]),
          "--constrain: three numbers from 0 to 1000" },
        { !p->kl_data || (isfinite(p->kl_weight) && p->kl_weight > 0), "--kl-weight must be above 0" },
        { !p->kl_data || (p->kl_rows >= 1 && p->kl_rows <= 65536), "--kl-rows must be 1 to 65536" },
    };
    for (size_t i = 0; i < KEEL_COUNT(check); i++) {
        if (!check[i].ok) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "%s", check[i].what);
        }
    }
    KEEL_TRY(check_guard(p, log));
    for (size_t i = 0; i < p->n_data; i++) {
        if (!p->data[i].path || !isfinite(p->data[i].weight) || p->data[i].weight <= 0) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "--data %s: its weight must be above 0",
                      p->data[i].path ? p->data[i].path : "(none)");
        }
    }
out:
    return st;
}

static keel_status check_direction(const struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const struct keel_monitor_direction *d = &r->p->monitor_direction;
    const uint32_t n = keel_model_info(r->model)->n_layers;
    if (d->v && !r->p->monitor) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--monitor-direction: no rows to project; give them with --monitor");
    }
    if (d->v && (d->layer >= n || d->site >= KEEL_SITE_TOWER)) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG,
                  "--monitor-direction: layer %u%s is not in the language model, which has layers 0 to %u", d->layer,
                  d->site >= KEEL_SITE_TOWER ? " of the tower" : "", n - 1);
    }
out:
    return st;
}

static keel_status check_layers(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const uint32_t n = keel_model_info(r->model)->n_layers;
    if (!r->p->layers) {
        return KEEL_OK;
    }
    r->layers = calloc(n, sizeof *r->layers);
    if (!r->layers) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "out of memory for a list of %u layers", n);
    }
    KEEL_TRY(keel_layers_parse(r->p->layers, r->layers, n, r->log));
out:
    return st;
}

keel_status keel_train_check_params(struct keel_train_run *r)
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
    KEEL_TRY(check_layers(r));
    KEEL_TRY(check_direction(r));
    if (p->n_frozen > KEEL_MAX_FROZEN) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--lora: %zu adapters, at most %d can be in force while training; merge some (keel merge)",
                  p->n_frozen, KEEL_MAX_FROZEN);
    }
    if ((r->targets & KEEL_VISION_TARGETS) && !p->images) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--targets %s: the vision tower is not there; give its file with --mmproj", p->targets);
    }
    if (p->layers && !(r->targets & ~KEEL_VISION_TARGETS)) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG, "--layers is of the language model, and --targets %s names none of it; leave it out", p->targets);
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

keel_status keel_train_check_outputs(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const char *out_name = r->p->out;
    struct keel_text dir = { 0 }, state = { 0 }, good = { 0 }, peft = { 0 };
    const char *slash = strrchr(out_name, '/');
    keel_text_addf(&dir, "%s", r->p->checkpoint ? r->p->checkpoint : out_name);
    while (!r->p->checkpoint && dir.len > 1 && dir.data[dir.len - 1] == '/') {
        dir.data[--dir.len] = '\0';
    }
    if (!r->p->checkpoint) {
        keel_text_addf(&dir, ".state");
    }
    keel_text_addf(&state, "%s/state.safetensors", dir.data ? dir.data : "");
    keel_text_addf(&good, "%s/good.safetensors", dir.data ? dir.data : "");
    keel_text_addf(&peft, "%s/adapter_model.safetensors", out_name);
    if (dir.failed || state.failed || good.failed || peft.failed) {
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
    r->good_path = good.data;
    dir = state = good = (struct keel_text){ 0 };
out:
    keel_text_finish(&dir);
    keel_text_finish(&state);
    keel_text_finish(&good);
    keel_text_finish(&peft);
    return st;
}

static bool has_images(const struct keel_train_set *set)
{
    for (uint64_t i = 0; i < set->n_rows; i++) {
        if (set->rows[i].n_images > 0) {
            return true;
        }
    }
    return false;
}

// A tower learns from images only: without any, its adapter stays as it began.
static keel_status check_images(const struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    if (!(r->targets & KEEL_VISION_TARGETS) || has_images(&r->set) || has_images(&r->lisa.set)) {
        return KEEL_OK;
    }
    if (r->targets & ~KEEL_VISION_TARGETS) {
        KEEL_WARN(r->log, "--targets %s: no row of --data has an image, so the vision tower's part learns nothing", r->p->targets);
        return KEEL_OK;
    }
    KEEL_FAIL(r->log, KEEL_ERR_DATA, "--targets %s: no row of --data has an image, so the vision tower has nothing to learn from", r->p->targets);
out:
    return st;
}

keel_status keel_train_check_plan(struct keel_train_run *r)
{
    keel_status st = KEEL_OK;
    const uint32_t longest = keel_train_longest(r);
    const uint64_t tokens = (uint64_t)r->p->batch * longest,
                   room = keel_device_caps(r->dev)->heap_free;
    struct keel_plan *plan = &r->plan;
    struct keel_text table = { 0 };
    KEEL_TRY(check_images(r));
    if (tokens > UINT32_MAX) {
        KEEL_FAIL(r->log, KEEL_ERR_ARG,
                  "--batch %u rows of up to %u tokens are too many; lower --batch and raise --accum",
                  r->p->batch, longest);
    }
    const struct keel_plan_params want = { .train_rank = r->p->rank,
                                           .train_tokens = (uint32_t)tokens,
                                           .train_row = longest,
                                           .train_lisa = r->lisa.set.n_rows > 0,
                                           .train_constrain_tokens = keel_train_constrained(r->p) ? r->set.n_loss : 0,
                                           .train_kl_tokens = r->kl.set.n_loss + r->monitor.set.n_loss,
                                           .images = r->p->images != NULL,
                                           .targets = r->p->targets,
                                           .layers = r->p->layers };
    KEEL_TRY(keel_model_plan(r->model, &want, plan));
    for (uint32_t i = 0; i < plan->n_rows; i++) {
        keel_text_addf(&table, "\n  %-28s %9.1f MB%s", plan->row[i].what, (double)plan->row[i].bytes / 1e6,
                       plan->row[i].host ? " (host)" : "");
    }
    if (room && plan->device_bytes > room) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY,
                  "training needs %.1f MB of device memory, %.1f MB are free; lower --batch (and raise "
                  "--accum), --rank or the length of "
                  "rows:%s",
                  (double)plan->device_bytes / 1e6, (double)room / 1e6, table.data ? table.data : "");
    }
    KEEL_DEBUG(r->log, "memory plan, %.1f MB on the device:%s", (double)plan->device_bytes / 1e6,
               table.data ? table.data : "");
out:
    keel_text_finish(&table);
    return st;
}
