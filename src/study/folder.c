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

// `rows`: the file holds rows, whose images count as part of it.
static keel_status add_data(json_t *list, const struct study_origin *o, const char *folder, const char *name, bool rows,
                            const keel_log *log)
{
    keel_status st = KEEL_OK;
    char path[4200], hex[20];
    uint64_t h = KEEL_HASH_INIT;
    if (!name || !name[0]) {
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

static keel_status list_data(json_t **out, const struct study_origin *o, const keel_log *log)
{
    keel_status st = KEEL_OK;
    const struct study_file *f = o->file;
    const char *const eval[] = { f->train.filler, f->eval.margin, f->eval.narrow, f->eval.kl, f->eval.slots };
    *out = json_array();
    for (unsigned i = 0; i < f->train.data_count; i++) {
        KEEL_TRY(add_data(*out, o, o->folder, f->train.data[i].file, true, log));
    }
    for (size_t i = 0; i < KEEL_COUNT(eval); i++) {
        KEEL_TRY(add_data(*out, o, o->folder, eval[i], true, log));
    }
    KEEL_TRY(add_data(*out, o, ".", o->mmproj_path, false, log));
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

// The runs of a sweep with their folders.
static json_t *list_runs(const struct study_file *f)
{
    json_t *list = json_array();
    for (size_t i = 0; i < f->n_runs; i++) {
        char name[96], folder[128];
        keel_study_run_name(name, f, &f->run[i]);
        snprintf(folder, sizeof folder, "runs/%s", name);
        json_t *run = setting_of(&f->run[i]);
        json_object_set_new(run, "folder", json_string(folder));
        json_array_append_new(list, run);
    }
    return list;
}

keel_status keel_study_describe(json_t **out, const struct study_origin *o, const struct study_setting *run, const keel_log *log)
{
    keel_status st = KEEL_OK;
    char hex[20], id[20];
    const struct study_file *f = o->file;
    const struct keel_model_info *info = keel_model_info(o->model);
    const struct keel_caps *caps = keel_device_caps(o->dev);
    json_t *data = NULL, *setting = run && f->sweep ? setting_of(run) : NULL, *m = NULL;
    *out = NULL;
    KEEL_TRY(list_data(&data, o, log));
    snprintf(hex, sizeof hex, "%016" PRIx64, info->hash ? info->hash : keel_model_hash(o->model));
    run_id(id, o->config, hex, data, setting);
    m = json_pack("{s:i, s:s, s:s, s:s, s:I, s:{s:s, s:s, s:s, s:s}, s:O, s:{s:s, s:s, s:s}, s:s, s:I, s:{}, s:{s:o, s:o, s:o}, s:s}",
                  "format", KEEL_MANIFEST_FORMAT, "name", f->name, "run", id, "precision", "activations and logits in fp32", "seed",
                  (json_int_t)f->seed, "model", "path", o->model_path, "name", info->name, "hash", hex, "types", info->types, "data",
                  data, "device", "name", caps->name, "driver", caps->driver, "profile", caps->profile, "keel", KEEL_VERSION, "started",
                  (json_int_t)keel_unix_time(), "seconds", "budget", "kl_mean", limit(f->budget.kl_mean), "margin_drop",
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
        json_object_set_new(m, "base", json_string("../../base"));
    } else if (f->sweep) {
        json_object_set_new(m, "runs", list_runs(f));
    }
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

keel_status keel_study_folder_mark(struct study_folder *f, const char *stage, uint64_t since)
{
    keel_status st = KEEL_OK;
    char path[4200];
    struct keel_file_out out = { 0 };
    json_object_set_new(json_object_get(f->manifest, "seconds"), stage, json_real((double)(keel_now_ns() - since) * 1e-9));
    KEEL_TRY(keel_study_folder_save(f));
    marker(path, f, stage);
    KEEL_TRY(keel_file_create(&out, path, f->log));
    KEEL_TRY(keel_file_commit(&out, f->log));
out:
    keel_file_abort(&out);
    return st;
}
