// SPDX-License-Identifier: MIT
// formats/gguf_write.c: writes GGUF v3: metadata is collected in memory, tensor data streams through.
// Does not own the file. Source: docs/gguf.md of the ggml project.
#include "formats.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 32u // GGUF's default, so general.alignment need not be written

struct tensor {
    size_t name_at; // in `names`
    enum keel_dtype type;
    uint32_t n_dims;
    uint64_t dims[4], bytes;
};

struct keel_gguf_writer {
    const keel_log *log;
    struct keel_text keys;  // encoded metadata
    struct keel_text names; // keys, then tensor names, NUL after each, for the search for duplicates
    size_t *key_at;         // of each key in `names`
    size_t n_keys, cap_keys;
    struct tensor *tensors;
    size_t n_tensors, cap_tensors;
    keel_status failed; // first failure; later additions do nothing
    FILE *f;
    size_t current;   // tensor that is being written
    uint64_t written; // bytes of it
};

keel_status keel_gguf_writer_create(keel_gguf_writer **out, const keel_log *log)
{
    *out = calloc(1, sizeof **out);
    if (!*out) {
        KEEL_ERROR(log, "out of memory for a GGUF writer");
        return KEEL_ERR_NO_MEMORY;
    }
    (*out)->log = log;
    return KEEL_OK;
}

void keel_gguf_writer_destroy(keel_gguf_writer **wp)
{
    if (*wp) {
        keel_text_finish(&(*wp)->keys);
        keel_text_finish(&(*wp)->names);
        free((*wp)->key_at);
        free((*wp)->tensors);
        free(*wp);
        *wp = NULL;
    }
}

// Room for one more element; doubles. False: w->failed is set.
static bool grow(keel_gguf_writer *w, void **list, size_t n, size_t *cap, size_t elem_bytes)
{
    if (n == *cap) {
        const size_t more = KEEL_MAX((size_t)32, *cap * 2);
        void *p = realloc(*list, more * elem_bytes);
        if (!p) {
            w->failed = KEEL_ERR_NO_MEMORY;
            return false;
        }
        *list = p;
        *cap = more;
    }
    return true;
}

static void add_string(struct keel_text *t, const char *s, size_t len)
{
    const uint64_t n = len;
    keel_text_add(t, &n, sizeof n);
    keel_text_add(t, s, len);
}

static bool add_key(keel_gguf_writer *w, const char *key, enum keel_gguf_type type)
{
    KEEL_ASSERT(!w->f);
    if (w->failed != KEEL_OK || !grow(w, (void **)&w->key_at, w->n_keys, &w->cap_keys, sizeof *w->key_at)) {
        return false;
    }
    const uint32_t t = type;
    w->key_at[w->n_keys++] = w->names.len;
    keel_text_add(&w->names, key, strlen(key) + 1);
    add_string(&w->keys, key, strlen(key));
    keel_text_add(&w->keys, &t, sizeof t);
    return true;
}

static void put_scalar(keel_gguf_writer *w, const char *key, enum keel_gguf_type type, const void *value,
                       size_t bytes)
{
    if (add_key(w, key, type)) {
        keel_text_add(&w->keys, value, bytes);
    }
}

static bool add_array(keel_gguf_writer *w, const char *key, enum keel_gguf_type type, size_t n)
{
    const uint32_t t = type;
    const uint64_t count = n;
    if (!add_key(w, key, KEEL_GGUF_ARRAY)) {
        return false;
    }
    keel_text_add(&w->keys, &t, sizeof t);
    keel_text_add(&w->keys, &count, sizeof count);
    return true;
}

void keel_gguf_put_u32(keel_gguf_writer *w, const char *key, uint32_t value)
{
    put_scalar(w, key, KEEL_GGUF_U32, &value, sizeof value);
}

void keel_gguf_put_i32(keel_gguf_writer *w, const char *key, int32_t value)
{
    put_scalar(w, key, KEEL_GGUF_I32, &value, sizeof value);
}

void keel_gguf_put_u64(keel_gguf_writer *w, const char *key, uint64_t value)
{
    put_scalar(w, key, KEEL_GGUF_U64, &value, sizeof value);
}

void keel_gguf_put_f32(keel_gguf_writer *w, const char *key, float value)
{
    put_scalar(w, key, KEEL_GGUF_F32, &value, sizeof value);
}

void keel_gguf_put_bool(keel_gguf_writer *w, const char *key, bool value)
{
    const uint8_t b = value;
    put_scalar(w, key, KEEL_GGUF_BOOL, &b, sizeof b);
}

void keel_gguf_put_str(keel_gguf_writer *w, const char *key, const char *value)
{
    keel_gguf_put_strn(w, key, value, strlen(value));
}

void keel_gguf_put_strn(keel_gguf_writer *w, const char *key, const char *value, size_t len)
{
    if (add_key(w, key, KEEL_GGUF_STR)) {
        add_string(&w->keys, value, len);
    }
}

void keel_gguf_put_i32s(keel_gguf_writer *w, const char *key, const int32_t *values, size_t n)
{
    if (add_array(w, key, KEEL_GGUF_I32, n)) {
        keel_text_add(&w->keys, values, n * sizeof *values);
    }
}

void keel_gguf_put_f32s(keel_gguf_writer *w, const char *key, const float *values, size_t n)
{
    if (add_array(w, key, KEEL_GGUF_F32, n)) {
        keel_text_add(&w->keys, values, n * sizeof *values);
    }
}

void keel_gguf_put_strs(keel_gguf_writer *w, const char *key, const char *const *values, size_t n)
{
    if (add_array(w, key, KEEL_GGUF_STR, n)) {
        for (size_t i = 0; i < n; i++) {
            add_string(&w->keys, values[i], strlen(values[i]));
        }
    }
}

void keel_gguf_put_strns(keel_gguf_writer *w, const char *key, const char *const *values, const size_t *lens,
                         size_t n)
{
    if (add_array(w, key, KEEL_GGUF_STR, n)) {
        for (size_t i = 0; i < n; i++) {
            add_string(&w->keys, values[i], lens[i]);
        }
    }
}

void keel_gguf_put_copy(keel_gguf_writer *w, const keel_gguf *from, size_t i)
{
    enum keel_gguf_type type;
    size_t bytes;
    const char *key = keel_gguf_key_at(from, i, &type);
    const uint8_t *raw = keel_gguf_key_raw(from, i, &bytes);
    if (strcmp(key, "general.alignment") != 0) { // the new file has its own
        put_scalar(w, key, type, raw, bytes);
    }
}

void keel_gguf_put_tensor(keel_gguf_writer *w, const char *name, enum keel_dtype type, uint32_t n_dims,
                          const uint64_t *dims)
{
    KEEL_ASSERT(!w->f);
    if (w->failed != KEEL_OK ||
        !grow(w, (void **)&w->tensors, w->n_tensors, &w->cap_tensors, sizeof *w->tensors)) {
        return;
    }
    const struct keel_dtype_info *info = keel_dtype_info((uint32_t)type);
    struct tensor t = { .name_at = w->names.len, .type = type, .n_dims = n_dims };
    bool good = info && n_dims >= 1 && n_dims <= 4 && dims[0] % info->block_elems == 0;
    uint64_t n = 1;
    for (uint32_t i = 0; good && i < n_dims; i++) {
        good = dims[i] > 0 && dims[i] <= ((uint64_t)1 << 56) / n;
        n *= good ? dims[i] : 1;
        t.dims[i] = dims[i];
    }
    if (!good) {
        KEEL_ERROR(w->log, "cannot write tensor '%s': its type or its dimensions cannot be stored", name);
        w->failed = KEEL_ERR_ARG;
        return;
    }
    t.bytes = keel_dtype_bytes(type, n);
    keel_text_add(&w->names, name, strlen(name) + 1);
    w->tensors[w->n_tensors++] = t;
}

// --- the file ------------------------------------------------------------------------------------

static keel_status write_bytes(keel_gguf_writer *w, const void *data, size_t bytes)
{
    if (bytes > 0 && fwrite(data, 1, bytes, w->f) != bytes) {
        KEEL_ERROR(w->log, "writing a GGUF file failed: %s", strerror(errno));
        return KEEL_ERR_IO;
    }
    return KEEL_OK;
}

static keel_status write_padding(keel_gguf_writer *w, uint64_t at)
{
    static const uint8_t zeros[ALIGNMENT];
    return write_bytes(w, zeros, (size_t)(keel_align_up(at, ALIGNMENT) - at));
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// Fails with ARG if two of the n names are equal.
static keel_status check_duplicates(keel_gguf_writer *w, const char **names, size_t n, const char *what)
{
    qsort(names, n, sizeof *names, by_text);
    for (size_t i = 1; i < n; i++) {
        if (strcmp(names[i - 1], names[i]) == 0) {
            KEEL_ERROR(w->log, "cannot write a GGUF file: %s '%s' was added twice", what, names[i]);
            return KEEL_ERR_ARG;
        }
    }
    return KEEL_OK;
}

static keel_status check_names(keel_gguf_writer *w)
{
    keel_status st = KEEL_OK;
    const char **names = malloc((KEEL_MAX(w->n_keys, w->n_tensors) + 1) * sizeof *names);
    if (!names || w->keys.failed || w->names.failed) {
        KEEL_FAIL(w->log, KEEL_ERR_NO_MEMORY, "out of memory for a GGUF header");
    }
    for (size_t i = 0; i < w->n_keys; i++) {
        names[i] = w->names.data + w->key_at[i];
    }
    KEEL_TRY(check_duplicates(w, names, w->n_keys, "metadata key"));
    for (size_t i = 0; i < w->n_tensors; i++) {
        names[i] = w->names.data + w->tensors[i].name_at;
    }
    KEEL_TRY(check_duplicates(w, names, w->n_tensors, "tensor"));
out:
    free(names);
    return st;
}

keel_status keel_gguf_writer_begin(keel_gguf_writer *w, FILE *f)
{
    keel_status st = w->failed;
    struct keel_text head = { 0 };
    const uint32_t version = 3;
    const uint64_t n_tensors = w->n_tensors, n_keys = w->n_keys;
    if (st != KEEL_OK) {
        if (st == KEEL_ERR_NO_MEMORY) { // other failures were logged where they happened
            KEEL_ERROR(w->log, "out of memory for a GGUF header");
        }
        return st;
    }
    w->f = f;
    KEEL_TRY(check_names(w));
    keel_text_add(&head, "GGUF", 4);
    keel_text_add(&head, &version, sizeof version);
    keel_text_add(&head, &n_tensors, sizeof n_tensors);
    keel_text_add(&head, &n_keys, sizeof n_keys);
    keel_text_add(&head, w->keys.data, w->keys.len);
    uint64_t offset = 0;
    for (size_t i = 0; i < w->n_tensors; i++) {
        const struct tensor *t = &w->tensors[i];
        const char *name = w->names.data + t->name_at;
        const uint32_t type = t->type;
        add_string(&head, name, strlen(name));
        keel_text_add(&head, &t->n_dims, sizeof t->n_dims);
        keel_text_add(&head, t->dims, t->n_dims * sizeof t->dims[0]);
        keel_text_add(&head, &type, sizeof type);
        keel_text_add(&head, &offset, sizeof offset);
        offset = keel_align_up(offset + t->bytes, ALIGNMENT);
    }
    if (head.failed) {
        KEEL_FAIL(w->log, KEEL_ERR_NO_MEMORY, "out of memory for a GGUF header");
    }
    KEEL_TRY(write_bytes(w, head.data, head.len));
    KEEL_TRY(write_padding(w, head.len));
out:
    keel_text_finish(&head);
    return st;
}

keel_status keel_gguf_writer_data(keel_gguf_writer *w, const void *data, size_t bytes)
{
    keel_status st = KEEL_OK;
    KEEL_ASSERT(w->f);
    if (bytes == 0) {
        return KEEL_OK;
    }
    if (w->current == w->n_tensors || bytes > w->tensors[w->current].bytes - w->written) {
        KEEL_FAIL(w->log, KEEL_ERR_ARG, "cannot write a GGUF file: more data than tensor '%s' holds",
                  w->current < w->n_tensors ? w->names.data + w->tensors[w->current].name_at
                                            : "(after the last)");
    }
    KEEL_TRY(write_bytes(w, data, bytes));
    w->written += bytes;
    if (w->written == w->tensors[w->current].bytes) {
        KEEL_TRY(write_padding(w, w->written));
        w->current++;
        w->written = 0;
    }
out:
    return st;
}

keel_status keel_gguf_writer_end(keel_gguf_writer *w)
{
    if (w->current < w->n_tensors) {
        KEEL_ERROR(w->log, "cannot finish a GGUF file: data of tensor '%s' is missing",
                   w->names.data + w->tensors[w->current].name_at);
        return KEEL_ERR_ARG;
    }
    w->f = NULL;
    return KEEL_OK;
}
