// SPDX-License-Identifier: MIT
// study/study.c: the loop: base evaluation, then training and evaluation of the adapted model or a chain of stages, report. A sweep
// evaluates the base once and then does the rest in one folder a run, in order.
#include "eval.h"
#include "folder.h"
#include "platform.h"
#include "run.h"

#include <keel/doctor.h>

#include <stdio.h>
#include <string.h>

bool keel_study_tokens(void *user, uint64_t done, uint64_t total)
{
    struct study *s = user;
    snprintf(s->label, sizeof s->label, "%s%.60s", s->prefix, s->stage);
    const char *unit = strcmp(s->stage, "images") == 0 ? "images" : "tokens";
    const struct keel_study_progress p = { s->label, unit, done, total, NULL };
    return !keel_interrupted() && (!s->p->progress || s->p->progress(s->p->user, &p));
}

bool keel_study_step(void *user, const struct keel_step_info *info)
{
    struct study *s = user;
    snprintf(s->label, sizeof s->label, "%strain", s->prefix);
    const struct keel_study_progress p = { s->label, "steps", info->step, s->n_steps ? s->n_steps : info->n_steps, info };
    return !s->p->progress || s->p->progress(s->p->user, &p);
}

// --- the whole -----------------------------------------------------------------------------------

// What the caller gives goes before what the study file names, which starts at its folder.
static void choose_path(const struct study *s, char out[4096], const char *given, const char *named)
{
    char path[4200] = "";
    if (!given && named) {
        keel_study_path(path, s->folder, named);
    }
    snprintf(out, 4096, "%.4000s", given ? given : path);
}

// Takes note of the images of a data file.
static keel_status scan(void *user, const char *name)
{
    const struct study *s = user;
    char path[4200];
    keel_study_path(path, s->folder, name);
    return keel_images_scan(s->images, path, s->log);
}

static bool trains_tower(const struct study_file *f)
{
    bool any = strstr(f->train.targets, "vision.") != NULL;
    for (size_t i = 0; i < f->n_stages; i++) {
        any = any || (f->stage[i].kind == STUDY_TRAIN && strstr(f->stage[i].train.targets, "vision."));
    }
    return any;
}

// Before anything runs: training would find out after the base evaluation.
static keel_status check_guards(const struct study *s, const struct study_train *t)
{
    keel_status st = KEEL_OK;
    for (unsigned i = 0; i < t->n_guard; i++) {
        struct keel_guard guard;
        KEEL_TRY(keel_guard_parse(t->guard[i], &guard, s->log));
    }
out:
    return st;
}

static keel_status open_all(struct study *s)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    const char *slash = strrchr(s->p->file, '/');
    KEEL_TRY(keel_map_open(&map, s->p->file, s->log));
    KEEL_TRY(keel_study_parse(&s->file, map.data, map.len_bytes, s->p->file, s->log));
    keel_text_add(&s->config, map.data, map.len_bytes);
    snprintf(s->folder, sizeof s->folder, "%.*s", slash ? (int)(slash - s->p->file) : 1, slash ? s->p->file : ".");
    KEEL_TRY(keel_study_check_words(s));
    KEEL_TRY(check_guards(s, &s->file->train));
    for (size_t i = 0; i < s->file->n_stages; i++) {
        KEEL_TRY(check_guards(s, &s->file->stage[i].train));
    }
    if (!s->p->model && !s->file->model) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: names no model; give one with -m", s->p->file);
    }
    choose_path(s, s->model_path, s->p->model, s->file->model);
    choose_path(s, s->mmproj_path, s->p->mmproj, s->file->mmproj);
    if (!s->mmproj_path[0] && trains_tower(s->file)) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: targets of the vision tower, but no tower; name one with \"mmproj\" or --mmproj", s->p->file);
    }
    if (!s->mmproj_path[0] && s->file->pan_and_scan) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: pan_and_scan, but no tower; name one with \"mmproj\" or --mmproj", s->p->file);
    }
    KEEL_TRY(keel_model_open_as(&s->model, s->model_path, s->p->type || s->p->model ? s->p->type : s->file->type,
                                s->log)); // first: a fault of the study should not cost the start of a device
    KEEL_TRY(keel_study_check_model(s));
    KEEL_TRY(keel_study_check_sets(s));
    KEEL_TRY(keel_device_create(&s->dev, s->p->device, s->log));
    KEEL_TRY(keel_doctor_prepare(s->dev, s->p->variant));
    if (s->mmproj_path[0]) {
        KEEL_TRY(keel_images_create(&s->images, s->model, s->mmproj_path, s->log));
        KEEL_TRY(keel_images_pan_and_scan(s->images, s->file->pan_and_scan ? keel_pan_and_scan_params() : NULL));
        KEEL_TRY(keel_study_each_rows(s->file, scan, s));
    }
out:
    keel_map_close(&map);
    return st;
}

keel_status keel_study_open(struct study *s, struct study_folder *folder, const char *path, const struct study_setting *run,
                            const struct study_stage *stage, const char *const *sub)
{
    json_t *manifest;
    const struct study_origin origin = { .file = s->file, .folder = s->folder, .config = s->config.data, .model_path = s->model_path,
                                         .mmproj_path = s->mmproj_path, .model = s->model, .dev = s->dev };
    const keel_status st = keel_study_describe(&manifest, &origin, run, stage, s->log);
    return st == KEEL_OK ? keel_study_folder_open(folder, path, manifest, sub, s->log) : st;
}

keel_status keel_study_load(struct study *s)
{
    keel_status st = KEEL_OK;
    if (keel_model_device(s->model)) {
        return KEEL_OK;
    }
    if (s->images) {
        s->stage = "images";
        KEEL_TRY(keel_images_encode(s->images, s->dev, keel_study_tokens, s));
    }
    KEEL_TRY(keel_model_load(s->model, s->dev));
out:
    return st;
}

// Without stages: a training and its evaluation.
static keel_status run_one(struct study *s, struct study_folder *folder, const struct study_setting *run)
{
    keel_status st = KEEL_OK;
    const struct study_state base = { .n_adapters = 0 };
    struct study_state tuned = { .adapter = { { .scale = 1.0f } }, .n_adapters = 1 };
    const struct study_training training = { .train = &s->file->train, .rank = run->rank, .mixture = run->mixture, .seed = run->seed,
                                             .from = &base };
    keel_study_path(tuned.adapter[0].path, folder->path, "adapter.gguf");
    if (!keel_study_folder_done(folder, "train") || !keel_study_folder_done(folder, "tuned")) {
        KEEL_TRY(keel_study_load(s));
    }
    if (!keel_study_folder_done(folder, "train")) {
        const uint64_t t0 = keel_now_ns();
        keel_device_reset_peak(s->dev);
        KEEL_TRY(keel_study_train(s, folder, &training, tuned.adapter[0].path));
        KEEL_TRY(keel_study_folder_mark(folder, "train", t0, s->dev));
    }
    KEEL_TRY(keel_study_evaluate(s, folder, "tuned", &tuned));
out:
    return st;
}

static keel_status run_setting(struct study *s, struct study_folder *folder, const struct study_setting *run)
{
    return s->file->n_stages > 0 ? keel_study_chain(s, folder, run) : run_one(s, folder, run);
}

static keel_status run_sweep(struct study *s)
{
    static const char *const one[] = { "train", "tuned", NULL }, *const chain[] = { "stages", NULL };
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < s->file->n_runs && st == KEEL_OK; i++) {
        struct study_folder folder = { 0 };
        char name[96], rel[128], path[4200];
        keel_study_run_name(name, s->file, &s->file->run[i]);
        snprintf(rel, sizeof rel, "runs/%s", name);
        keel_study_path(path, s->top.path, rel);
        snprintf(s->prefix, sizeof s->prefix, "%s (%zu of %zu), ", name, i + 1, s->file->n_runs);
        st = keel_study_open(s, &folder, path, &s->file->run[i], NULL, s->file->n_stages > 0 ? chain : one);
        if (st == KEEL_OK) {
            st = run_setting(s, &folder, &s->file->run[i]);
        }
        keel_study_folder_close(&folder);
    }
    return st;
}

static keel_status make_report(const char *dir, struct keel_study_result *result, const keel_log *log)
{
    bool over = false;
    const keel_status st = keel_report_write(dir, &over, log);
    if (st == KEEL_OK && result) {
        result->over_budget = over;
        snprintf(result->report, sizeof result->report, "%.4000s/report.html", dir);
    }
    return st;
}

// The caller's log with the study's place before each message: what is checked there does not know of a study.
struct placed {
    const struct study *study;
    const keel_log *to;
};

static void write_placed(void *user, enum keel_log_level level, const char *text)
{
    const struct placed *p = user;
    keel_log_write(p->to, level, "%s%s", p->study->place, text);
}

keel_status keel_study_run(const struct keel_study_params *params, struct keel_study_result *result, const keel_log *log)
{
    static const char *const whole[] = { "base", "train", "tuned", NULL }, *const chain[] = { "base", "stages", NULL };
    static const char *const sweep[] = { "base", "runs", NULL };
    static const struct study_state base = { .n_adapters = 0 };
    keel_status st = KEEL_OK;
    struct study s = { .p = params, .log = NULL };
    struct placed placed = { .study = &s, .to = log };
    const keel_log with_place = { .level = log ? log->level : KEEL_LOG_WARN, .write = write_placed, .user = &placed };
    s.log = &with_place;
    *result = (struct keel_study_result){ 0 };
    KEEL_TRY(open_all(&s));
    KEEL_TRY(keel_study_open(&s, &s.top, params->out, s.file->sweep ? NULL : &s.file->run[0], NULL,
                             s.file->sweep ? sweep : s.file->n_stages > 0 ? chain : whole));
    if (!keel_study_folder_done(&s.top, "base")) {
        KEEL_TRY(keel_study_load(&s));
    }
    snprintf(s.prefix, sizeof s.prefix, "base, ");
    KEEL_TRY(keel_study_directions(&s, STUDY_NO_STAGE, NULL));
    KEEL_TRY(keel_study_evaluate(&s, &s.top, "base", &base));
    snprintf(s.prefix, sizeof s.prefix, "%s", s.file->n_stages > 0 ? "" : "tuned, ");
    KEEL_TRY(s.file->sweep ? run_sweep(&s) : run_setting(&s, &s.top, &s.file->run[0]));
    KEEL_TRY(make_report(params->out, result, log));
out:
    keel_study_folder_close(&s.top);
    keel_images_destroy(&s.images);
    keel_model_close(&s.model);
    keel_device_destroy(&s.dev);
    keel_study_free(&s.file);
    keel_text_finish(&s.config);
    return st;
}

keel_status keel_report(const char *dir, struct keel_study_result *result, const keel_log *log)
{
    return make_report(dir, result, log);
}
