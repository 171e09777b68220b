// SPDX-License-Identifier: MIT
// train/checkpoint.c: saving and loading the training state; cutting a log back to it.
#include "checkpoint.h"
#include "platform.h"

#include <jansson.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK (4u << 20)
#define MAX_META 64

static const char *const tensor_name[4] = { "params", "m", "v", "other" };

// Progress as metadata: integers are exact, doubles have 17 digits.
struct progress {
    char text[5][40];
    struct keel_pair pair[7];
};

static void progress_make(struct progress *p, const struct keel_train_state *s)
{
    static const char *const key[5] = { "step", "rows", "tokens", "first_loss", "last_loss" };
    const uint64_t whole[3] = { s->step, s->rows, s->tokens };
    for (size_t i = 0; i < 5; i++) {
        if (i < 3) {
            snprintf(p->text[i], sizeof p->text[i], "%llu", (unsigned long long)whole[i]);
        } else {
            snprintf(p->text[i], sizeof p->text[i], "%.17g", i == 3 ? s->first_loss : s->last_loss);
        }
        p->pair[i] = (struct keel_pair){ key[i], p->text[i] };
    }
    p->pair[5] = (struct keel_pair){ "format", "keel.train.state.1" };
    p->pair[6] = (struct keel_pair){ "device", keel_device_caps(s->dev)->name };
}

static keel_status write_tensors(const struct keel_train_state *s, FILE *f)
{
    keel_status st = KEEL_OK;
    const uint64_t bytes = s->n_floats * sizeof(float);
    uint64_t hash = KEEL_HASH_INIT;
    uint8_t *buf = malloc(CHUNK);
    if (!buf) {
        KEEL_FAIL(s->log, KEEL_ERR_NO_MEMORY, "out of memory for writing the training state");
    }
    for (size_t i = 0; i < s->n_tensors; i++) {
        for (uint64_t at = 0; at < bytes; at += CHUNK) {
            const uint64_t n = KEEL_MIN(bytes - at, CHUNK);
            KEEL_TRY(keel_download(s->dev, buf, keel_span_sub(s->tensor[i], at, n), n));
            hash = keel_hash(hash, buf, n);
            fwrite(buf, 1, n, f); // an error shows at commit
        }
    }
    fwrite(&hash, sizeof hash, 1, f);
out:
    free(buf);
    return st;
}

keel_status keel_train_state_save(const struct keel_train_state *s, const char *path)
{
    keel_status st = KEEL_OK;
    struct keel_file_out file = { 0 };
    struct keel_pair meta[MAX_META];
    struct progress progress;
    struct keel_st_tensor t[5] = { 0 };
    KEEL_ASSERT(s->n_options + KEEL_COUNT(progress.pair) <= MAX_META);
    progress_make(&progress, s);
    memcpy(meta, progress.pair, sizeof progress.pair);
    memcpy(meta + KEEL_COUNT(progress.pair), s->options, s->n_options * sizeof *meta);
    for (size_t i = 0; i < s->n_tensors; i++) {
        t[i] = (struct keel_st_tensor){
            .name = tensor_name[i], .type = KEEL_ST_F32, .n_dims = 1, .dims = { s->n_floats }
        };
    }
    t[s->n_tensors] = (struct keel_st_tensor){ .name = "hash", .type = KEEL_ST_U64, .n_dims = 1, .dims = { 1 } };
    KEEL_TRY(keel_file_create(&file, path, s->log));
    KEEL_TRY(keel_st_write_header(file.f, t, s->n_tensors + 1, meta, s->n_options + KEEL_COUNT(progress.pair), s->log));
    KEEL_TRY(write_tensors(s, file.f));
    KEEL_TRY(keel_file_commit(&file, s->log));
out:
    if (st != KEEL_OK) {
        keel_file_abort(&file);
    }
    return st;
}

static keel_status check_options(const struct keel_train_state *s, const keel_st *file, const char *path)
{
    keel_status st = KEEL_OK;
    for (size_t i = 0; i < s->n_options; i++) {
        const char *was = keel_st_meta(file, s->options[i].key);
        if (!was || strcmp(was, s->options[i].value) != 0) {
            KEEL_FAIL(s->log, KEEL_ERR_MISMATCH,
                      "%s: belongs to another run: %s was %s, now it is %s; give the old value, or train "
                      "afresh without --resume",
                      path, s->options[i].key, was ? was : "not set", s->options[i].value);
        }
    }
    const char *device = keel_st_meta(file, "device");
    if (!device || strcmp(device, keel_device_caps(s->dev)->name) != 0) {
        KEEL_WARN(s->log, "%s: was written on %s; going on here may differ in the last bits", path,
                  device ? device : "?");
    }
out:
    return st;
}

static keel_status read_progress(struct keel_train_state *s, const keel_st *file, const char *path)
{
    keel_status st = KEEL_OK;
    unsigned long long step, rows, tokens;
    char rest;
    const char *text[5] = { keel_st_meta(file, "step"), keel_st_meta(file, "rows"),
                            keel_st_meta(file, "tokens"), keel_st_meta(file, "first_loss"),
                            keel_st_meta(file, "last_loss") };
    for (size_t i = 0; i < 5; i++) {
        text[i] = text[i] ? text[i] : "";
    }
    if (sscanf(text[0], "%llu%c", &step, &rest) != 1 || sscanf(text[1], "%llu%c", &rows, &rest) != 1 ||
        sscanf(text[2], "%llu%c", &tokens, &rest) != 1 ||
        sscanf(text[3], "%lf%c", &s->first_loss, &rest) != 1 ||
        sscanf(text[4], "%lf%c", &s->last_loss, &rest) != 1) {
        KEEL_FAIL(s->log, KEEL_ERR_FORMAT,
                  "%s: step, rows, tokens or losses are missing from its metadata; train without --resume",
                  path);
    }
    s->step = step;
    s->rows = rows;
    s->tokens = tokens;
out:
    return st;
}

static keel_status read_tensors(struct keel_train_state *s, const keel_st *file, const char *path)
{
    keel_status st = KEEL_OK;
    const uint64_t bytes = s->n_floats * sizeof(float);
    const struct keel_st_tensor *check = keel_st_find(file, "hash"), *t[4];
    uint64_t hash = KEEL_HASH_INIT, stored = 0;
    for (size_t i = 0; i < s->n_tensors; i++) {
        t[i] = keel_st_find(file, tensor_name[i]);
        if (!t[i] || t[i]->type != KEEL_ST_F32 || t[i]->n_elems != s->n_floats) {
            KEEL_FAIL(s->log, KEEL_ERR_FORMAT,
                      "%s: tensor %s is missing or not %llu F32 values; train without --resume", path,
                      tensor_name[i], (unsigned long long)s->n_floats);
        }
        hash = keel_hash(hash, t[i]->data, bytes);
    }
    if (check && check->bytes == sizeof stored) {
        memcpy(&stored, check->data, sizeof stored);
    }
    if (!check || check->bytes != sizeof stored || stored != hash) {
        KEEL_FAIL(s->log, KEEL_ERR_FORMAT,
                  "%s: damaged: its contents do not fit their checksum; train without --resume", path);
    }
    for (size_t i = 0; i < s->n_tensors; i++) {
        for (uint64_t at = 0; at < bytes; at += CHUNK) {
            const uint64_t n = KEEL_MIN(bytes - at, CHUNK);
            KEEL_TRY(keel_upload(s->dev, keel_span_sub(s->tensor[i], at, n), t[i]->data + at, n));
        }
    }
out:
    return st;
}

keel_status keel_train_state_load(struct keel_train_state *s, const char *path)
{
    keel_status st = KEEL_OK;
    struct keel_map map = { 0 };
    keel_st *file = NULL;
    KEEL_TRY(keel_map_open(&map, path, s->log));
    st = keel_st_parse(&file, map.data, map.len_bytes, path, s->log);
    if (st != KEEL_OK) {
        KEEL_FAIL(s->log, st, "%s: not a readable training state (reason above); train without --resume",
                  path);
    }
    const char *format = keel_st_meta(file, "format");
    if (!format || strcmp(format, "keel.train.state.1") != 0) {
        KEEL_FAIL(s->log, KEEL_ERR_FORMAT,
                  "%s: not a training state of this version of keel; train without --resume", path);
    }
    KEEL_TRY(check_options(s, file, path));
    KEEL_TRY(read_progress(s, file, path));
    KEEL_TRY(read_tensors(s, file, path));
out:
    keel_st_destroy(&file);
    keel_map_close(&map);
    return st;
}

keel_status keel_train_log_cut(const char *path, uint64_t step, const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct keel_file_out out = { 0 };
    char *line = NULL;
    size_t cap = 0;
    ssize_t len;
    FILE *in = fopen(path, "rbe");
    if (!in) {
        return KEEL_OK;
    }
    KEEL_TRY(keel_file_create(&out, path, log));
    while ((len = getline(&line, &cap, in)) > 0) {
        json_t *v = line[len - 1] == '\n' ? json_loadb(line, (size_t)len, 0, NULL) : NULL;
        const json_t *at = json_object_get(v, "step");
        if (json_is_integer(at) && json_integer_value(at) >= 1 && (uint64_t)json_integer_value(at) <= step) {
            fwrite(line, 1, (size_t)len, out.f); // an error shows at commit
        }
        json_decref(v);
    }
    if (ferror(in)) {
        KEEL_FAIL(log, KEEL_ERR_IO, "%s: cannot be read; move it away", path);
    }
    KEEL_TRY(keel_file_commit(&out, log));
out:
    if (st != KEEL_OK) {
        keel_file_abort(&out);
    }
    free(line);
    fclose(in);
    return st;
}
