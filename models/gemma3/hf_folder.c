// SPDX-License-Identifier: MIT
// gemma3/hf_folder.c: opens a Hugging Face folder: config.json and every safetensors file. Owns the maps; knows no tensor's
// meaning (hf_tensors.c).
#include "convert.h"

#include <stdlib.h>
#include <string.h>

bool keel_hf_path(char *out, size_t out_bytes, const char *folder, const char *name)
{
    const int n = snprintf(out, out_bytes, "%s/%s", folder, name);
    return n > 0 && (size_t)n < out_bytes;
}

static keel_status full_path(char out[4096], const char *folder, const char *name, const keel_log *log)
{
    if (!keel_hf_path(out, 4096, folder, name)) {
        KEEL_ERROR(log, "%s/%s: the path is too long", folder, name);
        return KEEL_ERR_ARG;
    }
    return KEEL_OK;
}

// --- shards --------------------------------------------------------------------------------------

static int by_file(const void *a, const void *b)
{
    return strcmp(((const struct keel_hf_place *)a)->file, ((const struct keel_hf_place *)b)->file);
}

static keel_status read_index(struct keel_hf_index *x, const char *path, const keel_log *log)
{
    struct keel_map map = {0};
    keel_status st = keel_map_open(&map, path, log);
    if (st == KEEL_OK) {
        st = keel_hf_index_parse(x, map.data, map.len_bytes, path, log);
    }
    keel_map_close(&map);
    return st;
}

keel_status keel_hf_each_shard(const char *folder, keel_status (*each)(void *user, const char *name, const char *tensor),
                               void *user, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_hf_index x = {0};
    char path[4096];
    KEEL_TRY(full_path(path, folder, "model.safetensors.index.json", log));
    if (!keel_path_exists(path)) {
        KEEL_TRY(full_path(path, folder, "model.safetensors", log));
        if (!keel_path_exists(path)) {
            KEEL_FAIL(log, KEEL_ERR_IO,
                      "%s: has neither model.safetensors nor model.safetensors.index.json; keel reads safetensors only (save the "
                      "model with transformers' save_pretrained)",
                      folder);
        }
        KEEL_TRY(each(user, "model.safetensors", NULL));
        goto out;
    }
    KEEL_TRY(read_index(&x, path, log));
    qsort(x.place, x.n, sizeof *x.place, by_file);
    for (size_t i = 0; i < x.n; i++) {
        if (i == 0 || strcmp(x.place[i].file, x.place[i - 1].file) != 0) {
            KEEL_TRY(each(user, x.place[i].file, x.place[i].tensor));
        }
    }
out:
    keel_hf_index_finish(&x);
    return st;
}

struct opening {
    struct keel_hf_folder *f;
    const keel_log *log;
};

static keel_status open_shard(void *user, const char *name, const char *tensor)
{
    keel_status st = KEEL_OK;
    const struct opening *o = user;
    struct keel_hf_folder *f = o->f;
    char path[4096];
    KEEL_TRY(full_path(path, f->path, name, o->log));
    if (!keel_path_exists(path)) {
        KEEL_FAIL(o->log, KEEL_ERR_IO, "%s: the shard is missing; the index says that it holds tensor \"%s\" (download it)", path,
                  tensor ? tensor : "");
    }
    struct keel_hf_file *more = realloc(f->file, (f->n_files + 1) * sizeof *more);
    if (!more) {
        KEEL_FAIL(o->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    f->file = more;
    struct keel_hf_file *file = &more[f->n_files++];
    *file = (struct keel_hf_file){.path = strdup(path)};
    if (!file->path) {
        KEEL_FAIL(o->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    KEEL_TRY(keel_map_open(&file->map, path, o->log));
    KEEL_TRY(keel_st_parse(&file->st, file->map.data, file->map.len_bytes, file->path, o->log));
out:
    return st;
}

// --- tensors -------------------------------------------------------------------------------------

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct keel_hf_tensor *)a)->t->name, ((const struct keel_hf_tensor *)b)->t->name);
}

static keel_status list_tensors(struct keel_hf_folder *f, const keel_log *log)
{
    keel_status st = KEEL_OK;
    size_t n = 0;
    for (size_t i = 0; i < f->n_files; i++) {
        n += keel_st_count(f->file[i].st);
    }
    f->tensor = calloc(n + 1, sizeof *f->tensor);
    if (!f->tensor) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: no memory for %zu tensors", f->path, n);
    }
    for (size_t i = 0; i < f->n_files; i++) {
        for (size_t k = 0; k < keel_st_count(f->file[i].st); k++) {
            f->tensor[f->n_tensors++] = (struct keel_hf_tensor){keel_st_at(f->file[i].st, k), (uint32_t)i, false};
        }
    }
    qsort(f->tensor, f->n_tensors, sizeof *f->tensor, by_name);
    for (size_t i = 1; i < f->n_tensors; i++) {
        if (strcmp(f->tensor[i - 1].t->name, f->tensor[i].t->name) == 0) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "tensor \"%s\" is in both %s and %s", f->tensor[i].t->name,
                      f->file[f->tensor[i - 1].file].path, f->file[f->tensor[i].file].path);
        }
    }
out:
    return st;
}

// What the index promises must be there, in the file that it names.
static keel_status check_index(const struct keel_hf_folder *f, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_hf_index x = {0};
    char path[4096];
    if (!keel_hf_path(path, sizeof path, f->path, "model.safetensors.index.json") || !keel_path_exists(path)) {
        return KEEL_OK;
    }
    KEEL_TRY(read_index(&x, path, log));
    for (size_t i = 0; i < x.n; i++) {
        const struct keel_st_tensor key_tensor = {.name = x.place[i].tensor};
        const struct keel_hf_tensor key = {.t = &key_tensor};
        const struct keel_hf_tensor *t = bsearch(&key, f->tensor, f->n_tensors, sizeof key, by_name);
        const char *file = t ? strrchr(f->file[t->file].path, '/') + 1 : NULL;
        if (!file || strcmp(file, x.place[i].file) != 0) {
            KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: tensor \"%s\" should be in %s, but is %s%s; the files do not belong together", path,
                      x.place[i].tensor, x.place[i].file, file ? "in " : "nowhere", file ? file : "");
        }
    }
out:
    keel_hf_index_finish(&x);
    return st;
}

keel_status keel_hf_open(struct keel_hf_folder *f, const char *path, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_map map = {0};
    char name[4096];
    struct opening o = {f, log};
    *f = (struct keel_hf_folder){.path = path};
    KEEL_TRY(full_path(name, path, "config.json", log));
    if (!keel_path_exists(name)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: is a folder without config.json, so no Hugging Face model; give a GGUF file or such a folder",
                  path);
    }
    KEEL_TRY(keel_map_open(&map, name, log));
    KEEL_TRY(keel_hf_config_parse(&f->config, map.data, map.len_bytes, name, log));
    KEEL_TRY(keel_hf_each_shard(path, open_shard, &o, log));
    KEEL_TRY(list_tensors(f, log));
    KEEL_TRY(check_index(f, log));
out:
    keel_map_close(&map);
    if (st != KEEL_OK) {
        keel_hf_close(f);
    }
    return st;
}

void keel_hf_close(struct keel_hf_folder *f)
{
    for (size_t i = 0; i < f->n_files; i++) {
        keel_st_destroy(&f->file[i].st);
        keel_map_close(&f->file[i].map);
        free(f->file[i].path);
    }
    free(f->file);
    free(f->tensor);
    *f = (struct keel_hf_folder){0};
}
