// SPDX-License-Identifier: MIT
// study/folder.c: run folders. A stage's marker file is written after all of its records, so that a killed study goes on where it
// was; the manifest's "run" is a hash of all that decides the results, so that a folder is never continued by another study.
#include "folder.h"

#include "eval.h"
#include "platform.h"
#include "probes.h"

#include <keel/keel.h>

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void keel_study_path(char out[4200], const char *folder, const char *name)
{
    snprintf(out, 4200, name[0] == '/' ? "%.0s%s" : "%s/%s", folder, name);
}

void keel_study_run_name(char out[96], const struct study_file *f, const struct study_setting *run)
{
    bool mixed = false;
    for (size_t i = 0; i < f->n_runs; i++) {
        mixed = mixed || f->run[i].mixture != f->run[0].mixture;
    }
    char part[40] = "";
    if (mixed) {
        snprintf(part, sizeof part, "_mixture-%g", run->mixture);
    }
    snprintf(out, 96, "rank-%u%s_seed-%" PRIu64, run->rank, part, run->seed);
}

// --- manifest ------------------------------------------------------------------------------------

static keel_status hash_file(uint64_t *hash, const char *path, const keel_log *log)
{
    struct keel_map map;
    const keel_status st = keel_map_open(&map, path, log);
    if (st == KEEL_OK) {
        *hash = keel_hash(*hash, map.data, map.len_bytes);
        keel_map_close(&map);
    }
    return st;
}

// Chains the bytes of every image that the rows name; with `tower` false there may be none.
static keel_status hash_images(uint64_t *hash, const char *path, bool tower, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_probes rows;
    KEEL_TRY(keel_probes_read(&rows, path, NULL, false, log));
    for (size_t i = 0; i < keel_probes_count(&rows); i++) {
        const json_t *files = keel_row_files(json_array_get(rows.rows, i));
        if (files && !tower) {
            KEEL_FAIL(log, KEEL_ERR_DATA, "%s:%llu: the row has images, but there is no vision tower; give mmproj in the study file, or --mmproj",
                      path, (unsigned long long)rows.line[i]);
        }
        for (size_t k = 0; k < json_array_size(files); k++) {
            KEEL_TRY(hash_file(hash, json_string_value(json_array_get(files, k)), log));
        }
    }
out:
    keel_probes_finish(&rows);
    return st;
}

static bool listed(const json_t *list, const char *name)
{
    size_t i;
    const json_t *entry;
    json_array_foreach(list, i, entry)
    {
        const char *file = json_string_value(json_object_get(entry, "file"));
        if (file && strcmp(file, name) == 0) {
            return true;
        }
    }
    return false;
}

// `rows`: the file holds rows, whose images count as part of it.
static keel_status add_data(json_t *list, const struct study_origin *o, const char *folder, const char *name, bool rows,
                            const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200], hex[20];
    uint64_t h = KEEL_HASH_INIT;
    if (!name || !name[0] || listed(list, name)) {
        return KEEL_OK;
    }
    keel_study_path(path, folder, name);
    KEEL_TRY(hash_file(&h, path, log));
    if (rows) {
        KEEL_TRY(hash_images(&h, path, o->mmproj_path[0] != 0, log));
    }
    snprintf(hex, sizeof hex, "%016" PRIx64, h);
    json_array_append_new(list, json_pack("{s:s, s:s}", "file", name, "hash", hex));
out:
    return st;
}

static keel_status once(json_t *seen, const char *name, keel_status (*fn)(void *user, const char *name), void *user)
{
    if (!name || json_object_get(seen, name)) {
        return KEEL_OK;
    }
    json_object_set_new(seen, name, json_true());
    return fn(user, name);
}

static keel_status each_of_training(json_t *seen, const struct study_train *t, keel_status (*fn)(void *user, const char *name), void *user)
{
    keel_status st = once(seen, t->filler, fn, user);
    st = st == KEEL_OK ? once(seen, t->kl_data, fn, user) : st;
    st = st == KEEL_OK ? once(seen, t->lisa_data, fn, user) : st;
    st = st == KEEL_OK ? once(seen, t->monitor, fn, user) : st;
    for (unsigned i = 0; i < t->data_count && st == KEEL_OK; i++) {
        st = once(seen, t->data[i].file, fn, user);
    }
    return st;
}

keel_status keel_study_each_rows(const struct study_file *f, keel_status (*fn)(void *user, const char *name), void *user)
{
    keel_status st = KEEL_OK;
    const char *const eval[] = { f->eval.margin, f->eval.narrow, f->eval.kl, f->eval.slots };
    json_t *seen = json_object();
    for (size_t i = 0; i < f->n_directions; i++) {
        KEEL_TRY(once(seen, f->direction[i].rows, fn, user));
    }
    KEEL_TRY(each_of_training(seen, &f->train, fn, user));
    for (size_t i = 0; i < f->n_stages; i++) {
        KEEL_TRY(each_of_training(seen, &f->stage[i].train, fn, user));
    }
    for (size_t i = 0; i < KEEL_COUNT(eval); i++) {
        KEEL_TRY(once(seen, eval[i], fn, user));
    }
out:
    json_decref(seen);
    return st;
}

struct data_list {
    json_t *list;
    const struct study_origin *o;
    const keel_log *log;
};

static keel_status add_rows(void *user, const char *name)
{
    const struct data_list *l = user;
    return add_data(l->list, l->o, l->o->folder, name, true, l->log);
}

// Files of directions that words steer with; not those that the study makes.
static keel_status add_words(const struct data_list *l, char *const *words, size_t n)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < n && st == KEEL_OK; i++) {
        struct keel_steer_words w;
        if (keel_study_find_direction(l->o->file, words[i])) {
            continue;
        }
        st = keel_steer_parse(&w, words[i], l->log);
        if (st == KEEL_OK) {
            st = add_data(l->list, l->o, l->o->folder, w.file, false, l->log);
            keel_steer_words_finish(&w);
        }
    }
    return st;
}

// Those of a training: preventative steering, and what its monitor projects on.
static keel_status add_training(const struct data_list *l, const struct study_train *t)
{
    const keel_status st = add_words(l, t->steer, t->n_steer);
    return st == KEEL_OK ? add_words(l, &t->monitor_direction, t->monitor_direction != NULL) : st;
}

static keel_status add_steering(const struct data_list *l)
{
    const struct study_file *f = l->o->file;
    keel_status st = add_training(l, &f->train);
    for (size_t i = 0; i < f->n_stages && st == KEEL_OK; i++) {
        st = add_words(l, f->stage[i].steer, f->stage[i].n_steer);
        st = st == KEEL_OK ? add_training(l, &f->stage[i].train) : st;
    }
    return st;
}

// The tower; of a folder, what it is converted to counts.
static keel_status add_tower(json_t *list, const struct study_origin *o, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4096], hex[20];
    uint64_t h = KEEL_HASH_INIT;
    if (!keel_path_is_dir(o->mmproj_path)) {
        return add_data(list, o, ".", o->mmproj_path, false, log);
    }
    KEEL_TRY(keel_convert_cached(o->mmproj_path, NULL, true, path, sizeof path, log));
    KEEL_TRY(hash_file(&h, path, log));
    snprintf(hex, sizeof hex, "%016" PRIx64, h);
    json_array_append_new(list, json_pack("{s:s, s:s}", "file", o->mmproj_path, "hash", hex));
out:
    return st;
}

static keel_status list_data(json_t **out, const struct study_origin *o, const keel_log *log)
{
    keel_status st = KEEL_OK;
    *out = json_array();
    struct data_list l = { *out, o, log };
    KEEL_TRY(keel_study_each_rows(o->file, add_rows, &l));
    KEEL_TRY(add_steering(&l));
    const char *along = o->file->eval.projection.directions;
    if (along && !keel_study_find_direction(o->file, along)) {
        KEEL_TRY(add_data(*out, o, o->folder, along, false, log));
    }
    KEEL_TRY(add_tower(*out, o, log));
out:
    return st;
}

static json_t *limit(double v)
{
    return isnan(v) ? json_null() : json_real(v);
}

static json_t *setting_of(const struct study_setting *run)
{
    return json_pack("{s:I, s:f, s:I}", "rank", (json_int_t)run->rank, "mixture", run->mixture, "seed", (json_int_t)run->seed);
}

// Hash of study file, model, data and setting.
static void run_id(char out[20], const char *config, const char *model, json_t *data, json_t *setting)
{
    json_t *identity = json_pack("{s:s, s:O}", "model", model, "data", data);
    if (setting) {
        json_object_set(identity, "setting", setting);
    }
    char *dump = json_dumps(identity, JSON_COMPACT | JSON_SORT_KEYS);
    uint64_t h = keel_hash(KEEL_HASH_INIT, config, strlen(config));
    h = keel_hash(h, dump ? dump : "", dump ? strlen(dump) : 0);
    free(dump);
    json_decref(identity);
    snprintf(out, 20, "%016" PRIx64, h);
}

// The runs of a sweep with their folders; of a single run that is where the manifest stands.
static json_t *list_runs(const struct study_file *f, const struct study_setting *only)
{
    json_t *list = json_array();
    for (size_t i = 0; i < f->n_runs; i++) {
        char name[96], folder[128];
        if (only && only != &f->run[i]) {
            continue;
        }
        keel_study_run_name(name, f, &f->run[i]);
        snprintf(folder, sizeof folder, "runs/%s", name);
        json_t *run = setting_of(&f->run[i]);
        json_object_set_new(run, "folder", json_string(only ? "." : folder));
        json_array_append_new(list, run);
    }
    return list;
}

static json_t *stage_of(const struct study_file *f, const struct study_stage *s)
{
    static const char *const kinds[] = { [STUDY_TRAIN] = "train", [STUDY_STEER] = "steer", [STUDY_SCALE] = "scale", [STUDY_MAP] = "map" };
    json_t *v = json_pack("{s:s, s:s, s:s, s:s}", "name", s->name, "group", s->group, "kind", kinds[s->kind], "from",
                          s->from == STUDY_NO_STAGE ? "base" : f->stage[s->from].name);
    json_object_set_new(v, "value", limit(s->value));
    if (s->percent) {
        json_object_set_new(v, "percent", json_true());
    }
    if (s->kind == STUDY_TRAIN) {
        json_object_set_new(v, "adapter", json_string(s->stack ? "stack" : s->from == STUDY_NO_STAGE ? "new" : "continue"));
    }
    if (s->watch.every > 0) {
        json_object_set_new(v, "watch", json_pack("{s:o, s:o, s:s, s:s}", "above", limit(s->watch.above), "below", limit(s->watch.below),
                                                  "domain", s->watch.domain, "modality", s->watch.modality));
    }
    return v;
}

static json_t *list_stages(const struct study_file *f)
{
    json_t *list = json_array();
    for (size_t i = 0; i < f->n_stages; i++) {
        json_array_append_new(list, stage_of(f, &f->stage[i]));
    }
    return list;
}

// Where the run's manifest stands: above, in a folder of a sweep or of a stage, and what it is made of.
static void set_place(json_t *m, const struct study_file *f, const struct study_setting *run, const struct study_stage *stage)
{
    const char *const base = f->sweep && run ? stage ? "../../../../base" : "../../base" : stage ? "../../base" : NULL;
    if (base) {
        json_object_set_new(m, "base", json_string(base));
    }
    if (stage) {
        json_object_set_new(m, "stage", stage_of(f, stage));
    } else if (f->n_stages > 0) {
        json_object_set_new(m, "stages", list_stages(f));
    }
    if (!stage && ((f->sweep && !run) || f->n_stages > 0)) {
        json_object_set_new(m, "runs", list_runs(f, run));
    }
}

keel_status keel_study_describe(json_t **out, const struct study_origin *o, const struct study_setting *run,
                                const struct study_stage *stage, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char hex[20], id[20], precision[96];
    const struct study_file *f = o->file;
    const struct keel_model_info *info = keel_model_info(o->model);
    const struct keel_caps *caps = keel_device_caps(o->dev);
    json_t *data = NULL, *setting = run && f->sweep ? setting_of(run) : NULL, *m = NULL;
    *out = NULL;
    if (stage) {
        setting = setting ? setting : json_object();
        json_object_set_new(setting, "stage", json_string(stage->name));
    }
    KEEL_TRY(list_data(&data, o, log));
    snprintf(hex, sizeof hex, "%016" PRIx64, info->hash ? info->hash : keel_model_hash(o->model));
    run_id(id, o->config, hex, data, setting);
    const bool packed = strcmp(f->eval.kv, "f32") != 0;
    snprintf(precision, sizeof precision, "activations and logits in fp32%s%s", packed ? ", cached keys and values in " : "",
             packed ? f->eval.kv : "");
    m = json_pack("{s:i, s:s, s:s, s:s, s:I, s:{s:s, s:s, s:s, s:s}, s:O, s:{s:s, s:s, s:s}, s:s, s:I, s:{}, s:{}, s:{s:o, s:o, s:o}, s:s}",
                  "format", KEEL_MANIFEST_FORMAT, "name", f->name, "run", id, "precision", precision, "seed",
                  (json_int_t)f->seed, "model", "path", o->model_path, "name", info->name, "hash", hex, "types", info->types, "data",
                  data, "device", "name", caps->name, "driver", caps->driver, "profile", caps->profile, "keel", KEEL_VERSION, "started",
                  (json_int_t)keel_unix_time(), "seconds", "peak_bytes", "budget", "kl_mean", limit(f->budget.kl_mean), "margin_drop",
                  limit(f->budget.margin_drop), "flip_rate", limit(f->budget.flip_rate), "config", o->config);
    if (!m) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "out of memory for the manifest");
    }
    if (f->narrow_domain) {
        json_object_set_new(m, "narrow_domain", json_string(f->narrow_domain));
    }
    if (f->narrow_modality) {
        json_object_set_new(m, "narrow_modality", json_string(f->narrow_modality));
    }
    if (setting) {
        json_object_set(m, "setting", setting);
    }
    set_place(m, f, run, stage);
    *out = m;
out:
    json_decref(setting);
    json_decref(data);
    return st;
}

// --- folders -------------------------------------------------------------------------------------

keel_status keel_study_folder_save(const struct study_folder *f)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    keel_study_path(path, f->path, "manifest.json");
    KEEL_TRY(keel_file_create(&out, path, f->log));
    json_dumpf(f->manifest, out.f, JSON_INDENT(2));
    fputc('\n', out.f);
    KEEL_TRY(keel_file_commit(&out, f->log));
out:
    keel_file_abort(&out);
    return st;
}

keel_status keel_study_folder_open(struct study_folder *f, const char *path, json_t *manifest, const char *const *sub, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char name[4200];
    *f = (struct study_folder){ .manifest = manifest, .log = log };
    snprintf(f->path, sizeof f->path, "%s", path);
    keel_study_path(name, path, "manifest.json");
    if (keel_path_exists(name)) {
        json_error_t error;
        json_t *old = json_load_file(name, 0, &error);
        const char *was = json_string_value(json_object_get(old, "run")), *is = json_string_value(json_object_get(manifest, "run"));
        if (!was || strcmp(was, is) != 0) {
            json_decref(old);
            KEEL_FAIL(log, KEEL_ERR_MISMATCH,
                      "%s: holds another study (its study file, model or data differ); give another --out folder or remove this one",
                      path);
        }
        json_decref(f->manifest);
        f->manifest = old;
        KEEL_INFO(log, "%s: going on with the study that is in it", path);
    }
    KEEL_TRY(keel_make_dirs(path, log));
    for (; *sub; sub++) {
        keel_study_path(name, path, *sub);
        KEEL_TRY(keel_make_dirs(name, log));
    }
    KEEL_TRY(keel_study_folder_save(f));
out:
    return st;
}

void keel_study_folder_close(struct study_folder *f)
{
    json_decref(f->manifest);
    *f = (struct study_folder){ 0 };
}

static void marker(char out[4200], const struct study_folder *f, const char *stage)
{
    char name[64];
    snprintf(name, sizeof name, "%.40s/.done", stage);
    keel_study_path(out, f->path, name);
}

bool keel_study_folder_done(const struct study_folder *f, const char *stage)
{
    char path[4200];
    marker(path, f, stage);
    return keel_path_exists(path);
}

keel_status keel_study_folder_mark(struct study_folder *f, const char *stage, uint64_t since, const keel_device *dev)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    uint64_t now, peak;
    keel_device_memory(dev, &now, &peak);
    json_object_set_new(json_object_get(f->manifest, "peak_bytes"), stage, json_integer((json_int_t)peak));
    json_object_set_new(json_object_get(f->manifest, "seconds"), stage, json_real((double)(keel_now_ns() - since) * 1e-9));
    KEEL_TRY(keel_study_folder_save(f));
    marker(path, f, stage);
    KEEL_TRY(keel_file_create(&out, path, f->log));
    KEEL_TRY(keel_file_commit(&out, f->log));
out:
    keel_file_abort(&out);
    return st;
}
