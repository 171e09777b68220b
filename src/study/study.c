// SPDX-License-Identifier: MIT
// study/study.c: the loop: base evaluation, training, evaluation of the adapted model, report; the run folder and its manifest.
// A stage's marker file is written after all of its records, so that a killed study goes on where it was.
#include "eval.h"
#include "measure.h"
#include "platform.h"
#include "study_file.h"

#include <keel/session.h>
#include <keel/study.h>

#include <jansson.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct study {
    const struct keel_study_params *p;
    const keel_log *log;
    struct study_file *file;
    char folder[4096]; // of the study file
    char model_path[4096];
    keel_device *dev;
    keel_model *model;
    json_t *manifest;
    const char *stage;
};

static void path_in(char out[4200], const char *folder, const char *name)
{
    snprintf(out, 4200, name[0] == '/' ? "%.0s%s" : "%s/%s", folder, name);
}

static bool report_progress(void *user, uint64_t done, uint64_t total)
{
    const struct study *s = user;
    const struct keel_study_progress p = { s->stage, done, total, NULL };
    return !keel_interrupted() && (!s->p->progress || s->p->progress(s->p->user, &p));
}

static bool report_step(void *user, const struct keel_step_info *info)
{
    const struct study *s = user;
    const struct keel_study_progress p = { "train", info->step, info->n_steps, info };
    return !s->p->progress || s->p->progress(s->p->user, &p);
}

// --- manifest ------------------------------------------------------------------------------------

static keel_status save_manifest(const struct study *s)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    path_in(path, s->p->out, "manifest.json");
    KEEL_TRY(keel_file_create(&out, path, s->log));
    json_dumpf(s->manifest, out.f, JSON_INDENT(2));
    fputc('\n', out.f);
    KEEL_TRY(keel_file_commit(&out, s->log));
out:
    keel_file_abort(&out);
    return st;
}

static keel_status hash_file(uint64_t *hash, const char *path, const keel_log *log)
{
    struct keel_map map;
    const keel_status st = keel_map_open(&map, path, log);
    if (st == KEEL_OK) {
        *hash = keel_hash(KEEL_HASH_INIT, map.data, map.len_bytes);
        keel_map_close(&map);
    }
    return st;
}

static keel_status add_data(const struct study *s, json_t *list, const char *name)
{
    keel_status st = KEEL_OK;
    char path[4200], hex[20];
    uint64_t h;
    if (!name) {
        return KEEL_OK;
    }
    path_in(path, s->folder, name);
    KEEL_TRY(hash_file(&h, path, s->log));
    snprintf(hex, sizeof hex, "%016" PRIx64, h);
    json_array_append_new(list, json_pack("{s:s, s:s}", "file", name, "hash", hex));
out:
    return st;
}

static json_t *limit(double v)
{
    return isnan(v) ? json_null() : json_real(v);
}

// Everything that decides the results; two runs with equal "identity" may share a folder.
static keel_status describe(struct study *s, const char *config)
{
    keel_status st = KEEL_OK;
    char hex[20];
    const struct study_file *f = s->file;
    json_t *data = json_array();
    for (unsigned i = 0; i < f->train.data_count; i++) {
        KEEL_TRY(add_data(s, data, f->train.data[i].file));
    }
    KEEL_TRY(add_data(s, data, f->eval.margin));
    KEEL_TRY(add_data(s, data, f->eval.narrow));
    KEEL_TRY(add_data(s, data, f->eval.kl));
    snprintf(hex, sizeof hex, "%016" PRIx64, keel_model_hash(s->model));
    json_t *identity = json_pack("{s:s, s:O}", "model", hex, "data", data);
    char *dump = json_dumps(identity, JSON_COMPACT | JSON_SORT_KEYS);
    uint64_t h = keel_hash(KEEL_HASH_INIT, config, strlen(config));
    h = keel_hash(h, dump ? dump : "", dump ? strlen(dump) : 0);
    free(dump);
    json_decref(identity);
    char id[20];
    snprintf(id, sizeof id, "%016" PRIx64, h);
    const struct keel_model_info *info = keel_model_info(s->model);
    const struct keel_caps *caps = keel_device_caps(s->dev);
    s->manifest = json_pack("{s:i, s:s, s:s, s:s, s:I, s:{s:s, s:s, s:s, s:s}, s:O, s:{s:s, s:s, s:s}, s:s, s:I, s:{}, s:{s:o, s:o, s:o}, s:s}",
                            "format", KEEL_MANIFEST_FORMAT, "name", f->name, "run", id, "precision", "activations and logits in fp32",
                            "seed", (json_int_t)f->seed, "model", "path", s->model_path, "name", info->name, "hash", hex, "types",
                            info->types, "data", data, "device", "name", caps->name, "driver", caps->driver, "profile", caps->profile,
                            "keel", KEEL_VERSION, "started", (json_int_t)keel_unix_time(), "seconds", "budget", "kl_mean",
                            limit(f->budget.kl_mean), "margin_drop", limit(f->budget.margin_drop), "flip_rate",
                            limit(f->budget.flip_rate), "config", config);
    if (!s->manifest) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "%s: out of memory for the manifest", s->p->out);
    }
    if (f->narrow_domain) {
        json_object_set_new(s->manifest, "narrow_domain", json_string(f->narrow_domain));
    }
out:
    json_decref(data);
    return st;
}

// Takes over the folder's manifest if it belongs to this run, else refuses; makes the folder otherwise.
static keel_status open_folder(struct study *s)
{
    keel_status st = KEEL_OK;
    char path[4200];
    static const char *const sub[] = { "base", "train", "tuned" };
    path_in(path, s->p->out, "manifest.json");
    if (keel_path_exists(path)) {
        json_error_t error;
        json_t *old = json_load_file(path, 0, &error);
        const char *was = json_string_value(json_object_get(old, "run")), *is = json_string_value(json_object_get(s->manifest, "run"));
        if (!was || strcmp(was, is) != 0) {
            json_decref(old);
            KEEL_FAIL(s->log, KEEL_ERR_MISMATCH,
                      "%s: holds another study (its study file, model or data differ); give another --out folder or remove this one",
                      s->p->out);
        }
        json_decref(s->manifest);
        s->manifest = old;
        KEEL_INFO(s->log, "%s: going on with the study that is in it", s->p->out);
    }
    KEEL_TRY(keel_make_dirs(s->p->out, s->log));
    for (size_t i = 0; i < KEEL_COUNT(sub); i++) {
        path_in(path, s->p->out, sub[i]);
        KEEL_TRY(keel_make_dirs(path, s->log));
    }
    KEEL_TRY(save_manifest(s));
out:
    return st;
}

// --- stages --------------------------------------------------------------------------------------

static bool is_done(const struct study *s, const char *stage)
{
    char path[4200], name[64];
    snprintf(name, sizeof name, "%s/.done", stage);
    path_in(path, s->p->out, name);
    return keel_path_exists(path);
}

static keel_status mark_done(struct study *s, const char *stage, uint64_t since)
{
    keel_status st = KEEL_OK;
    char path[4200], name[64];
    struct keel_file_out out = { 0 };
    json_object_set_new(json_object_get(s->manifest, "seconds"), stage, json_real((double)(keel_now_ns() - since) * 1e-9));
    KEEL_TRY(save_manifest(s));
    snprintf(name, sizeof name, "%s/.done", stage);
    path_in(path, s->p->out, name);
    KEEL_TRY(keel_file_create(&out, path, s->log));
    KEEL_TRY(keel_file_commit(&out, s->log));
out:
    keel_file_abort(&out);
    return st;
}

// One measurement of a stage, unless its record file is there.
typedef keel_status (*measure)(keel_session *s, const keel_model *m, const char *in, const char *out, measure_progress progress,
                               void *user, const keel_log *log);

static keel_status measure_file(struct study *s, keel_session *session, const char *stage, const char *in, const char *name, measure run)
{
    char from[4200], to[4200], rel[128];
    if (!in) {
        return KEEL_OK;
    }
    path_in(from, s->folder, in);
    snprintf(rel, sizeof rel, "%s/%s", stage, name);
    path_in(to, s->p->out, rel);
    return keel_path_exists(to) ? KEEL_OK : run(session, s->model, from, to, report_progress, s, s->log);
}

static keel_status answers(struct study *s, keel_session *session, const char *stage, uint32_t rows)
{
    char from[4200], to[4200], rel[64];
    if (!s->file->eval.kl) {
        return KEEL_OK;
    }
    path_in(from, s->folder, s->file->eval.kl);
    snprintf(rel, sizeof rel, "%s/answers.jsonl", stage);
    path_in(to, s->p->out, rel);
    return keel_path_exists(to) ? KEEL_OK
                                : keel_measure_answers(session, s->model, from, to, s->file->eval.answer_tokens, rows, report_progress, s,
                                                       s->log);
}

// `adapter`: NULL for the base model.
static keel_status evaluate(struct study *s, const char *stage, const char *adapter)
{
    keel_status st = KEEL_OK;
    keel_session *session = NULL;
    const uint64_t t0 = keel_now_ns();
    const struct keel_session_params params = { .n_ctx = KEEL_MIN(1024u, keel_model_info(s->model)->context) };
    if (is_done(s, stage)) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_session_create(&session, s->model, &params));
    if (adapter) {
        KEEL_TRY(keel_session_add_adapter(session, adapter, 1.0f));
    }
    s->stage = adapter ? "tuned: margins" : "base: margins";
    KEEL_TRY(measure_file(s, session, stage, s->file->eval.margin, "margin.jsonl", keel_measure_margin));
    s->stage = adapter ? "tuned: narrow task" : "base: narrow task";
    KEEL_TRY(measure_file(s, session, stage, s->file->eval.narrow, "narrow.jsonl", keel_measure_narrow));
    s->stage = adapter ? "tuned: answers" : "base: answers";
    if (!adapter || s->file->eval.examples > 0) {
        KEEL_TRY(answers(s, session, stage, adapter ? s->file->eval.examples : 0));
    }
    if (adapter && s->file->eval.kl) {
        char from[4200];
        path_in(from, s->p->out, "base/answers.jsonl");
        s->stage = "tuned: divergence";
        char to[4200];
        path_in(to, s->p->out, "tuned/kl.jsonl");
        if (!keel_path_exists(to)) {
            KEEL_TRY(keel_measure_kl(session, s->model, from, to, report_progress, s, s->log));
        }
    }
    KEEL_TRY(mark_done(s, stage, t0));
out:
    keel_session_destroy(&session);
    return st;
}

static keel_status train(struct study *s, const char *adapter)
{
    keel_status st = KEEL_OK;
    const struct study_train *t = &s->file->train;
    const uint64_t t0 = keel_now_ns();
    char state[4200], log[4200];
    char(*paths)[4200] = calloc(t->data_count, sizeof *paths);
    struct keel_train_data *data = calloc(t->data_count, sizeof *data);
    struct keel_train_result result;
    if (!paths || !data) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for the list of data files");
    }
    for (unsigned i = 0; i < t->data_count; i++) {
        path_in(paths[i], s->folder, t->data[i].file);
        data[i] = (struct keel_train_data){ paths[i], (float)t->data[i].weight };
    }
    path_in(state, s->p->out, "train/state");
    path_in(log, s->p->out, "train/log.jsonl");
    if (is_done(s, "train")) {
        goto out;
    }
    struct keel_train_params params = { KEEL_TRAIN_DEFAULTS };
    params.data = data;
    params.n_data = t->data_count;
    params.out = adapter;
    params.rank = t->rank;
    params.alpha = (float)t->alpha;
    params.targets = t->targets ? t->targets : "all";
    params.lr = t->lr;
    params.schedule = t->schedule ? t->schedule : "constant";
    params.warmup = t->warmup;
    params.steps = t->steps;
    params.epochs = t->epochs;
    params.batch = t->batch;
    params.accum = t->accum;
    params.seq_len = t->seq_len;
    params.seed = s->file->seed;
    params.weight_decay = t->weight_decay;
    params.grad_clip = t->grad_clip;
    params.checkpoint = state;
    params.resume = true;
    params.save_every = 10;
    params.log = log;
    params.on_step = report_step;
    params.user = s;
    KEEL_TRY(keel_train(s->model, &params, &result));
    json_object_set_new(s->manifest, "training",
                        json_pack("{s:I, s:f, s:f, s:I, s:I}", "steps", (json_int_t)result.steps, "first_loss", result.first_loss,
                                  "last_loss", result.last_loss, "rows", (json_int_t)result.n_rows, "parameters",
                                  (json_int_t)result.n_params));
    KEEL_TRY(mark_done(s, "train", t0));
out:
    free(paths);
    free(data);
    return st;
}

// --- the whole -----------------------------------------------------------------------------------

static keel_status open_all(struct study *s)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    struct keel_text config = { 0 };
    KEEL_TRY(keel_map_open(&map, s->p->file, s->log));
    KEEL_TRY(keel_study_parse(&s->file, map.data, map.len_bytes, s->p->file, s->log));
    keel_text_add(&config, map.data, map.len_bytes);
    const char *slash = strrchr(s->p->file, '/');
    snprintf(s->folder, sizeof s->folder, "%.*s", slash ? (int)(slash - s->p->file) : 1, slash ? s->p->file : ".");
    if (!s->p->model && !s->file->model) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: names no model; give one with -m", s->p->file);
    }
    if (s->p->model) {
        snprintf(s->model_path, sizeof s->model_path, "%s", s->p->model);
    } else {
        char path[4200];
        path_in(path, s->folder, s->file->model);
        snprintf(s->model_path, sizeof s->model_path, "%.4000s", path);
    }
    KEEL_TRY(keel_device_create(&s->dev, s->p->device, s->log));
    KEEL_TRY(keel_model_open(&s->model, s->model_path, s->log));
    KEEL_TRY(describe(s, config.data));
    KEEL_TRY(open_folder(s));
out:
    keel_text_finish(&config);
    keel_map_close(&map);
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

keel_status keel_study_run(const struct keel_study_params *params, struct keel_study_result *result, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct study s = { .p = params, .log = log };
    char adapter[4200];
    *result = (struct keel_study_result){ 0 };
    KEEL_TRY(open_all(&s));
    path_in(adapter, params->out, "adapter.gguf");
    if (!is_done(&s, "base") || !is_done(&s, "train") || !is_done(&s, "tuned")) {
        KEEL_TRY(keel_model_load(s.model, s.dev));
    }
    KEEL_TRY(evaluate(&s, "base", NULL));
    KEEL_TRY(train(&s, adapter));
    KEEL_TRY(evaluate(&s, "tuned", adapter));
    KEEL_TRY(make_report(params->out, result, log));
out:
    keel_model_close(&s.model);
    keel_device_destroy(&s.dev);
    keel_study_free(&s.file);
    json_decref(s.manifest);
    return st;
}

keel_status keel_report(const char *dir, struct keel_study_result *result, const keel_log *log)
{
    return make_report(dir, result, log);
}
