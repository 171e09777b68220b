// SPDX-License-Identifier: MIT
// study/study.c: the loop: base evaluation, training, evaluation of the adapted model, report. A sweep evaluates the base once and
// then does the rest in one folder a run, in order.
#include "eval.h"
#include "folder.h"
#include "measure.h"
#include "platform.h"

#include <keel/study.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct study {
    const struct keel_study_params *p;
    const keel_log *log;
    struct study_file *file;
    char folder[4096]; // of the study file
    char model_path[4096], mmproj_path[4096]; // the latter may be empty
    struct keel_text config; // text of the study file
    keel_device *dev;
    keel_model *model;
    keel_images *images; // NULL: no row has images
    struct study_folder top; // OUT
    const char *stage;
    char prefix[160], label[240]; // of the run: "rank-16_seed-1 (2 of 6), "; with the stage
};

static bool report_progress(void *user, uint64_t done, uint64_t total)
{
    struct study *s = user;
    snprintf(s->label, sizeof s->label, "%s%.60s", s->prefix, s->stage);
    const char *unit = strcmp(s->stage, "images") == 0 ? "images" : "tokens";
    const struct keel_study_progress p = { s->label, unit, done, total, NULL };
    return !keel_interrupted() && (!s->p->progress || s->p->progress(s->p->user, &p));
}

static bool report_step(void *user, const struct keel_step_info *info)
{
    struct study *s = user;
    snprintf(s->label, sizeof s->label, "%strain", s->file->sweep ? s->prefix : "");
    const struct keel_study_progress p = { s->label, "steps", info->step, info->n_steps, info };
    return !s->p->progress || s->p->progress(s->p->user, &p);
}

// --- evaluation ----------------------------------------------------------------------------------

// One evaluation: of the base, or of the model with a run's adapter.
struct evaluation {
    struct study *s;
    const struct study_folder *folder; // where its records go
    const char *stage;                 // "base" or "tuned"
    struct keel_measure m;
};

static void record_path(char out[4200], const struct evaluation *e, const char *name)
{
    char rel[128];
    snprintf(rel, sizeof rel, "%s/%s", e->stage, name);
    keel_study_path(out, e->folder->path, rel);
}

// Whether a record file must still be measured; tells the user what comes.
static bool missing(const struct evaluation *e, char path[4200], const char *name, const char *what)
{
    record_path(path, e, name);
    e->s->stage = what;
    return !keel_path_exists(path);
}

static keel_status probes(const struct evaluation *e)
{
    keel_status st = KEEL_OK;
    char from[4200], to[4200];
    const struct study_eval *f = &e->s->file->eval;
    if (f->margin && missing(e, to, "margin.jsonl", "margins")) {
        keel_study_path(from, e->s->folder, f->margin);
        KEEL_TRY(keel_measure_margin(&e->m, from, to));
    }
    if (f->narrow && missing(e, to, "narrow.jsonl", "narrow task")) {
        keel_study_path(from, e->s->folder, f->narrow);
        KEEL_TRY(keel_measure_narrow(&e->m, from, to));
    }
out:
    return st;
}

static keel_status slots(const struct evaluation *e)
{
    keel_status st = KEEL_OK;
    char from[4200], to[4200], context[4200], keep[4200];
    const struct study_file *file = e->s->file;
    struct keel_measure_slots how = { .k = file->eval.context_rows, .seed = file->seed };
    if (!file->eval.slots) {
        return KEEL_OK;
    }
    keel_study_path(from, e->s->folder, file->eval.slots);
    if (missing(e, to, "slots.jsonl", "slots")) {
        KEEL_TRY(keel_measure_slots(&e->m, from, to, &how));
    }
    if (file->eval.context_rows > 0 && missing(e, to, "slots_incontext.jsonl", "slots in context")) {
        keel_study_path(context, e->s->folder, file->train.data[0].file);
        how.context = context;
        how.max_rows = file->eval.context_probes;
        KEEL_TRY(keel_measure_slots(&e->m, from, to, &how));
    }
    if (file->eval.examples > 0 && missing(e, to, "examples.jsonl", "examples")) {
        keel_study_path(keep, e->s->top.path, "base");
        KEEL_TRY(keel_measure_examples(&e->m, from, to, file->eval.answer_tokens, file->eval.examples, file->seed,
                                       strcmp(e->stage, "base") == 0 ? keep : NULL));
    }
out:
    return st;
}

// Soft tokens under what `adapter` changes in the vision tower; NULL: under the tower as it is. Most adapters change nothing there,
// then nothing happens.
static keel_status images_under(struct study *s, const char *adapter)
{
    keel_status st = KEEL_OK;
    if (s->images) {
        keel_images_clear_adapters(s->images);
        if (adapter) {
            KEEL_TRY(keel_images_add_adapter(s->images, s->model, s->dev, adapter, 1.0f));
        }
        s->stage = "images";
        KEEL_TRY(keel_images_encode(s->images, s->dev, report_progress, s));
    }
out:
    return st;
}

static keel_status answers(const struct evaluation *e, bool base)
{
    keel_status st = KEEL_OK;
    char prompts[4200], from[4200], to[4200], base_answers[4200];
    const struct study_file *f = e->s->file;
    const uint32_t examples = f->eval.examples;
    if (!f->eval.kl) {
        return KEEL_OK;
    }
    keel_study_path(base_answers, e->s->top.path, "base/answers.jsonl");
    keel_study_path(prompts, e->s->folder, f->eval.kl);
    if ((base || examples > 0) && missing(e, to, "answers.jsonl", "answers")) {
        KEEL_TRY(keel_measure_answers(&e->m, prompts, to, f->eval.answer_tokens, base ? 0 : examples));
    }
    if (!base && missing(e, to, "kl.jsonl", "divergence")) {
        KEEL_TRY(keel_measure_kl(&e->m, base_answers, prompts, to));
    }
    if (examples > 0 && missing(e, to, "relevance.jsonl", "relevance")) {
        record_path(from, e, "answers.jsonl");
        keel_session_clear_adapters(e->m.session); // the base judges the answers of both
        KEEL_TRY(images_under(e->s, NULL));
        e->s->stage = "relevance";
        KEEL_TRY(keel_measure_relevance(&e->m, from, prompts, to, examples, f->seed));
    }
out:
    return st;
}

// `adapter`: NULL for the base model.
static keel_status evaluate(struct study *s, struct study_folder *folder, const char *adapter)
{
    keel_status st = KEEL_OK;
    keel_session *session = NULL;
    const uint64_t t0 = keel_now_ns();
    const char *stage = adapter ? "tuned" : "base";
    const struct keel_session_params params = { .n_ctx = KEEL_MIN(1024u, keel_model_info(s->model)->context) };
    if (keel_study_folder_done(folder, stage)) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_session_create(&session, s->model, &params));
    if (adapter) {
        KEEL_TRY(keel_session_add_adapter(session, adapter, 1.0f));
    }
    KEEL_TRY(images_under(s, adapter));
    const struct evaluation e = { s, folder, stage, { session, s->model, s->images, s->file->eval.chat, report_progress, s, s->log } };
    KEEL_TRY(probes(&e));
    KEEL_TRY(slots(&e));
    KEEL_TRY(answers(&e, !adapter));
    KEEL_TRY(keel_study_folder_mark(folder, stage, t0));
out:
    keel_session_destroy(&session);
    return st;
}

// --- training ------------------------------------------------------------------------------------

// The files of a mixture: the study's data with share `mixture` in all, the filler with the rest. `paths` and `data` hold one more
// than the data files. Returns how many there are.
static size_t mix(const struct study *s, double mixture, char (*paths)[4200], struct keel_train_data *data)
{
    const struct study_train *t = &s->file->train;
    double sum = 0;
    size_t n = 0;
    for (unsigned i = 0; i < t->data_count; i++) {
        sum += t->data[i].weight;
    }
    for (unsigned i = 0; i < t->data_count && mixture > 0; i++) {
        keel_study_path(paths[n], s->folder, t->data[i].file);
        data[n] = (struct keel_train_data){ paths[n], (float)(mixture < 1 ? mixture * t->data[i].weight / sum : t->data[i].weight) };
        n++;
    }
    if (mixture < 1) {
        keel_study_path(paths[n], s->folder, t->filler);
        data[n] = (struct keel_train_data){ paths[n], (float)(1 - mixture) };
        n++;
    }
    return n;
}

static struct keel_train_params train_params(const struct study *s, const struct study_setting *run)
{
    const struct study_train *t = &s->file->train;
    struct keel_train_params p = { KEEL_TRAIN_DEFAULTS };
    p.rank = run->rank;
    p.seed = run->seed;
    p.alpha = (float)(t->alpha_per_rank > 0 ? t->alpha_per_rank * run->rank : t->alpha); // 0: training takes twice the rank
    p.targets = t->targets;
    p.lr = t->lr;
    p.schedule = t->schedule;
    p.warmup = t->warmup;
    p.steps = t->steps;
    p.epochs = t->epochs;
    p.batch = t->batch;
    p.accum = t->accum;
    p.seq_len = t->seq_len;
    p.weight_decay = t->weight_decay;
    p.grad_clip = t->grad_clip;
    p.resume = true;
    p.save_every = 10;
    return p;
}

static keel_status train(struct study *s, struct study_folder *folder, const struct study_setting *run, const char *adapter)
{
    keel_status st = KEEL_OK;
    const unsigned n = s->file->train.data_count + 1;
    const uint64_t t0 = keel_now_ns();
    char state[4200], log[4200];
    char(*paths)[4200] = calloc(n, sizeof *paths);
    struct keel_train_data *data = calloc(n, sizeof *data);
    struct keel_train_params params = train_params(s, run);
    struct keel_train_result result;
    if (!paths || !data) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "no memory for the list of data files");
    }
    if (keel_study_folder_done(folder, "train")) {
        goto out;
    }
    keel_study_path(state, folder->path, "train/state");
    keel_study_path(log, folder->path, "train/log.jsonl");
    params.data = data;
    params.n_data = mix(s, run->mixture, paths, data);
    params.out = adapter;
    params.images = s->images;
    params.checkpoint = state;
    params.log = log;
    params.on_step = report_step;
    params.user = s;
    KEEL_TRY(keel_train(s->model, &params, &result));
    json_object_set_new(folder->manifest, "training",
                        json_pack("{s:I, s:f, s:f, s:I, s:I}", "steps", (json_int_t)result.steps, "first_loss", result.first_loss,
                                  "last_loss", result.last_loss, "rows", (json_int_t)result.n_rows, "parameters",
                                  (json_int_t)result.n_params));
    KEEL_TRY(keel_study_folder_mark(folder, "train", t0));
out:
    free(paths);
    free(data);
    return st;
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

static keel_status scan(const struct study *s, const char *name)
{
    char path[4200];
    if (!name) {
        return KEEL_OK;
    }
    keel_study_path(path, s->folder, name);
    return keel_images_scan(s->images, path, s->log);
}

// Takes note of every image of the data.
static keel_status scan_images(const struct study *s)
{
    keel_status st = KEEL_OK;
    const struct study_file *f = s->file;
    const char *const eval[] = { f->train.filler, f->eval.margin, f->eval.narrow, f->eval.kl, f->eval.slots };
    for (unsigned i = 0; i < f->train.data_count; i++) {
        KEEL_TRY(scan(s, f->train.data[i].file));
    }
    for (size_t i = 0; i < KEEL_COUNT(eval); i++) {
        KEEL_TRY(scan(s, eval[i]));
    }
out:
    return st;
}

static keel_status open_all(struct study *s)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    KEEL_TRY(keel_map_open(&map, s->p->file, s->log));
    KEEL_TRY(keel_study_parse(&s->file, map.data, map.len_bytes, s->p->file, s->log));
    keel_text_add(&s->config, map.data, map.len_bytes);
    const char *slash = strrchr(s->p->file, '/');
    snprintf(s->folder, sizeof s->folder, "%.*s", slash ? (int)(slash - s->p->file) : 1, slash ? s->p->file : ".");
    if (!s->p->model && !s->file->model) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: names no model; give one with -m", s->p->file);
    }
    choose_path(s, s->model_path, s->p->model, s->file->model);
    choose_path(s, s->mmproj_path, s->p->mmproj, s->file->mmproj);
    if (!s->mmproj_path[0] && strstr(s->file->train.targets, "vision.")) {
        KEEL_FAIL(s->log, KEEL_ERR_ARG, "%s: targets of the vision tower, but no tower; name one with \"mmproj\" or --mmproj", s->p->file);
    }
    KEEL_TRY(keel_device_create(&s->dev, s->p->device, s->log));
    KEEL_TRY(keel_model_open(&s->model, s->model_path, s->log));
    if (s->mmproj_path[0]) {
        KEEL_TRY(keel_images_create(&s->images, s->model, s->mmproj_path, s->log));
        KEEL_TRY(scan_images(s));
    }
out:
    keel_map_close(&map);
    return st;
}

static keel_status open_folder(struct study *s, struct study_folder *folder, const char *path, const struct study_setting *run,
                               const char *const *sub)
{
    json_t *manifest;
    const struct study_origin origin = { .file = s->file, .folder = s->folder, .config = s->config.data, .model_path = s->model_path,
                                         .mmproj_path = s->mmproj_path, .model = s->model, .dev = s->dev };
    const keel_status st = keel_study_describe(&manifest, &origin, run, s->log);
    return st == KEEL_OK ? keel_study_folder_open(folder, path, manifest, sub, s->log) : st;
}

// Images, then weights, when the first stage needs them: the tower and the model are not on the device together.
static keel_status load(struct study *s)
{
    keel_status st = KEEL_OK;
    if (keel_model_device(s->model)) {
        return KEEL_OK;
    }
    if (s->images) {
        s->stage = "images";
        KEEL_TRY(keel_images_encode(s->images, s->dev, report_progress, s));
    }
    KEEL_TRY(keel_model_load(s->model, s->dev));
out:
    return st;
}

static keel_status run_one(struct study *s, struct study_folder *folder, const struct study_setting *run, const char *prefix)
{
    keel_status st = KEEL_OK;
    char adapter[4200];
    keel_study_path(adapter, folder->path, "adapter.gguf");
    if (!keel_study_folder_done(folder, "train") || !keel_study_folder_done(folder, "tuned")) {
        KEEL_TRY(load(s));
    }
    snprintf(s->prefix, sizeof s->prefix, "%s", prefix);
    KEEL_TRY(train(s, folder, run, adapter));
    KEEL_TRY(evaluate(s, folder, adapter));
out:
    return st;
}

static keel_status run_sweep(struct study *s)
{
    static const char *const sub[] = { "train", "tuned", NULL };
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < s->file->n_runs && st == KEEL_OK; i++) {
        struct study_folder folder = { 0 };
        char name[96], rel[128], path[4200], prefix[160];
        keel_study_run_name(name, s->file, &s->file->run[i]);
        snprintf(rel, sizeof rel, "runs/%s", name);
        keel_study_path(path, s->top.path, rel);
        snprintf(prefix, sizeof prefix, "%s (%zu of %zu), ", name, i + 1, s->file->n_runs);
        st = open_folder(s, &folder, path, &s->file->run[i], sub);
        if (st == KEEL_OK) {
            st = run_one(s, &folder, &s->file->run[i], prefix);
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

keel_status keel_study_run(const struct keel_study_params *params, struct keel_study_result *result, const keel_log *log)
{
    static const char *const whole[] = { "base", "train", "tuned", NULL }, *const sweep[] = { "base", "runs", NULL };
    keel_status st = KEEL_OK;
    struct study s = { .p = params, .log = log };
    *result = (struct keel_study_result){ 0 };
    KEEL_TRY(open_all(&s));
    KEEL_TRY(open_folder(&s, &s.top, params->out, s.file->sweep ? NULL : &s.file->run[0], s.file->sweep ? sweep : whole));
    if (!keel_study_folder_done(&s.top, "base")) {
        KEEL_TRY(load(&s));
    }
    snprintf(s.prefix, sizeof s.prefix, "base, ");
    KEEL_TRY(evaluate(&s, &s.top, NULL));
    KEEL_TRY(s.file->sweep ? run_sweep(&s) : run_one(&s, &s.top, &s.file->run[0], "tuned, "));
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
