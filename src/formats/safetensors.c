// SPDX-License-Identifier: MIT
// formats/safetensors.c: reads a safetensors file from a byte range and writes one to a stream.
// Header checks are those of the reference implementation: no overlap, no hole, nothing beyond the end.
// Source: the safetensors project's README, "Format".
#include "formats.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define MAX_HEADER_BYTES 100000000u // the reference implementation's limit

struct keel_st {
    json_t *root; // owns names and metadata
    struct keel_st_tensor *tensors;
    size_t n;
};

static const struct {
    const char *name;
    uint32_t bytes;
} types[] = {
    { "BOOL", 1 }, { "U8", 1 },  { "I8", 1 },  { "U16", 2 }, { "I16", 2 }, { "F16", 2 }, { "BF16", 2 },
    { "U32", 4 },  { "I32", 4 }, { "F32", 4 }, { "U64", 8 }, { "I64", 8 }, { "F64", 8 },
};

const char *keel_st_type_name(enum keel_st_type type)
{
    return (unsigned)type < KEEL_COUNT(types) ? types[type].name : "unknown";
}

// --- reading -------------------------------------------------------------------------------------

struct reader {
    const uint8_t *data; // after the header
    uint64_t len;
    const char *name;
    const keel_log *log;
};

static keel_status read_type(const struct reader *r, const json_t *entry, struct keel_st_tensor *t)
{
    const char *s = json_string_value(json_object_get(entry, "dtype"));
    if (!s) {
        KEEL_ERROR(r->log, "%s: tensor '%s' has no \"dtype\"", r->name, t->name);
        return KEEL_ERR_FORMAT;
    }
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        if (strcmp(types[i].name, s) == 0) {
            t->type = (enum keel_st_type)i;
            return KEEL_OK;
        }
    }
    KEEL_ERROR(r->log, "%s: tensor '%s' has dtype %.32s; keel reads F32, F16, BF16, F64, BOOL and integers",
               r->name, t->name, s);
    return KEEL_ERR_UNSUPPORTED;
}

static keel_status read_shape(const struct reader *r, const json_t *entry, struct keel_st_tensor *t)
{
    keel_status st = KEEL_OK;
    const json_t *shape = json_object_get(entry, "shape");
    const size_t n = json_array_size(shape); // 0 for what is no array
    if (!json_is_array(shape) || n > KEEL_ST_MAX_DIMS) {
        KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: tensor '%s': \"shape\" must be a list of at most %d numbers",
                  r->name, t->name, KEEL_ST_MAX_DIMS);
    }
    t->n_dims = (uint32_t)n;
    t->n_elems = 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(shape, i);
        const int64_t dim = json_is_integer(v) ? json_integer_value(v) : -1;
        if (dim < 0 || (t->n_elems > 0 && (uint64_t)dim > (uint64_t)INT64_MAX / 8 / t->n_elems)) {
            KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: tensor '%s': dimension %zu is not a usable size", r->name,
                      t->name, i);
        }
        t->dims[i] = (uint64_t)dim;
        t->n_elems *= (uint64_t)dim;
    }
    t->bytes = t->n_elems * types[t->type].bytes;
out:
    return st;
}

static keel_status read_tensor(const struct reader *r, const char *name, const json_t *entry,
                               struct keel_st_tensor *t)
{
    keel_status st = KEEL_OK;
    t->name = name;
    if (!json_is_object(entry)) {
        KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: header entry '%s' is not an object", r->name, name);
    }
    KEEL_TRY(read_type(r, entry, t));
    KEEL_TRY(read_shape(r, entry, t));
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last)) {
        KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: tensor '%s': \"data_offsets\" must be two integers", r->name,
                  name);
    }
    const int64_t from = json_integer_value(first), to = json_integer_value(last);
    if (from < 0 || to < from || (uint64_t)to > r->len) {
        KEEL_FAIL(r->log, KEEL_ERR_FORMAT,
                  "%s: tensor '%s': bytes %" PRId64 " to %" PRId64 " do not lie in the %" PRIu64
                  " bytes of data: truncated or damaged",
                  r->name, name, from, to, r->len);
    }
    if ((uint64_t)(to - from) != t->bytes) {
        KEEL_FAIL(r->log, KEEL_ERR_FORMAT,
                  "%s: tensor '%s': %" PRId64 " bytes of data, its shape and type need %" PRIu64, r->name,
                  name, to - from, t->bytes);
    }
    t->data = r->data + from;
out:
    return st;
}

static int by_place(const void *a, const void *b)
{
    const struct keel_st_tensor *x = a, *y = b;
    if (x->data != y->data) {
        return x->data < y->data ? -1 : 1;
    }
    return (x->bytes > y->bytes) -
           (x->bytes < y->bytes); // empty tensors before the one they share a start with
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct keel_st_tensor *)a)->name, ((const struct keel_st_tensor *)b)->name);
}

static keel_status check_places(const struct reader *r, struct keel_st *s)
{
    const uint8_t *at = r->data;
    qsort(s->tensors, s->n, sizeof *s->tensors, by_place);
    for (size_t i = 0; i < s->n; i++) {
        if (s->tensors[i].data != at) {
            KEEL_ERROR(
                r->log,
                "%s: tensor '%s' starts at byte %td of the data, where byte %td was due: overlap or hole",
                r->name, s->tensors[i].name, s->tensors[i].data - r->data, at - r->data);
            return KEEL_ERR_FORMAT;
        }
        at += s->tensors[i].bytes;
    }
    if (at != r->data + r->len) {
        KEEL_ERROR(r->log, "%s: %td bytes after the last tensor belong to none: truncated header or damaged",
                   r->name, r->data + r->len - at);
        return KEEL_ERR_FORMAT;
    }
    return KEEL_OK;
}

static keel_status read_entries(const struct reader *r, struct keel_st *s)
{
    keel_status st = KEEL_OK;
    const char *key;
    json_t *value;
    s->tensors = calloc(json_object_size(s->root) + 1, sizeof *s->tensors);
    if (!s->tensors) {
        KEEL_FAIL(r->log, KEEL_ERR_NO_MEMORY, "%s: out of memory", r->name);
    }
    json_object_foreach(s->root, key, value)
    {
        if (strcmp(key, "__metadata__") == 0) {
            const char *meta_key;
            json_t *meta_value;
            if (!json_is_object(value)) {
                KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: \"__metadata__\" is not an object", r->name);
            }
            json_object_foreach(value, meta_key, meta_value)
            {
                if (!json_is_string(meta_value)) {
                    KEEL_FAIL(r->log, KEEL_ERR_FORMAT, "%s: metadata '%s' is not a string", r->name,
                              meta_key);
                }
            }
            continue;
        }
        KEEL_TRY(read_tensor(r, key, value, &s->tensors[s->n]));
        s->n++;
    }
    KEEL_TRY(check_places(r, s));
    qsort(s->tensors, s->n, sizeof *s->tensors, by_name);
out:
    return st;
}

keel_status keel_st_parse(keel_st **out, const uint8_t *data, size_t len, const char *name,
                          const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_error_t err;
    uint64_t header;
    *out = NULL;
    keel_st *s = calloc(1, sizeof *s);
    if (!s) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    if (len < sizeof header) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: %zu bytes are too few for a safetensors file", name, len);
    }
    memcpy(&header, data, sizeof header);
    if (header > len - sizeof header || header > MAX_HEADER_BYTES) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT,
                  "%s: offset 0: a header of %" PRIu64
                  " bytes does not fit: truncated, or no safetensors file",
                  name, header);
    }
    s->root = json_loadb((const char *)data + sizeof header, (size_t)header, JSON_REJECT_DUPLICATES, &err);
    if (!s->root) {
        const bool memory = json_error_code(&err) == json_error_out_of_memory;
        KEEL_FAIL(log, memory ? KEEL_ERR_NO_MEMORY : KEEL_ERR_FORMAT, "%s: offset %zu: header: %s", name,
                  sizeof header + (size_t)KEEL_MAX(err.position, 0), err.text);
    }
    if (!json_is_object(s->root)) {
        KEEL_FAIL(log, KEEL_ERR_FORMAT, "%s: the header is not a JSON object", name);
    }
    const struct reader r = { data + sizeof header + header, len - sizeof header - header, name, log };
    KEEL_TRY(read_entries(&r, s));
    *out = s;
    s = NULL;
out:
    keel_st_destroy(&s);
    return st;
}

void keel_st_destroy(keel_st **sp)
{
    if (*sp) {
        json_decref((*sp)->root);
        free((*sp)->tensors);
        free(*sp);
        *sp = NULL;
    }
}

size_t keel_st_count(const keel_st *st)
{
    return st->n;
}

const struct keel_st_tensor *keel_st_at(const keel_st *st, size_t i)
{
    KEEL_ASSERT(i < st->n);
    return &st->tensors[i];
}

const struct keel_st_tensor *keel_st_find(const keel_st *st, const char *name)
{
    const struct keel_st_tensor key = { .name = name };
    return bsearch(&key, st->tensors, st->n, sizeof key, by_name);
}

const char *keel_st_meta(const keel_st *st, const char *key)
{
    return json_string_value(json_object_get(json_object_get(st->root, "__metadata__"), key));
}

static float read_f64(const uint8_t *p)
{
    double d;
    memcpy(&d, p, sizeof d);
    return (float)d;
}

static float read_int(const uint8_t *p, enum keel_st_type type)
{
    uint64_t u = 0;
    memcpy(&u, p, types[type].bytes);
    switch (type) {
    case KEEL_ST_I8:
        return (float)(int8_t)u;
    case KEEL_ST_I16:
        return (float)(int16_t)u;
    case KEEL_ST_I32:
        return (float)(int32_t)u;
    case KEEL_ST_I64:
        return (float)(int64_t)u;
    default:
        return (float)u;
    }
}

void keel_st_to_f32(const struct keel_st_tensor *t, float *dst)
{
    switch (t->type) {
    case KEEL_ST_F32:
        keel_dequantize(KEEL_F32, t->data, dst, t->n_elems);
        return;
    case KEEL_ST_F16:
        keel_dequantize(KEEL_F16, t->data, dst, t->n_elems);
        return;
    case KEEL_ST_BF16:
        keel_dequantize(KEEL_BF16, t->data, dst, t->n_elems);
        return;
    default:
        for (uint64_t i = 0; i < t->n_elems; i++) {
            const uint8_t *p = t->data + i * types[t->type].bytes;
            dst[i] = t->type == KEEL_ST_F64 ? read_f64(p) : read_int(p, t->type);
        }
    }
}

// --- writing -------------------------------------------------------------------------------------

static keel_status add_entry(json_t *root, const struct keel_st_tensor *t, uint64_t *offset,
                             const keel_log *log)
{
    keel_status st = KEEL_OK;
    json_t *shape = NULL;
    uint64_t n = 1;
    if (t->n_dims > KEEL_ST_MAX_DIMS || (unsigned)t->type >= KEEL_COUNT(types) ||
        !keel_utf8_valid(t->name, strlen(t->name), NULL) || strcmp(t->name, "__metadata__") == 0 ||
        json_object_get(root, t->name)) {
        KEEL_FAIL(log, KEEL_ERR_ARG,
                  "cannot write tensor '%s': its name is taken or not UTF-8, or its type or shape unknown",
                  t->name);
    }
    shape = json_array();
    for (uint32_t i = 0; i < t->n_dims; i++) {
        if (t->dims[i] > ((uint64_t)1 << 56) / KEEL_MAX(n, (uint64_t)1)) {
            KEEL_FAIL(log, KEEL_ERR_ARG, "cannot write tensor '%s': it is too large", t->name);
        }
        n *= t->dims[i];
        json_array_append_new(shape, json_integer((json_int_t)t->dims[i]));
    }
    const uint64_t end = *offset + n * types[t->type].bytes;
    json_t *entry = json_pack("{s:s, s:O, s:[I, I]}", "dtype", types[t->type].name, "shape", shape,
                              "data_offsets", (json_int_t)*offset, (json_int_t)end);
    if (!entry || json_array_size(shape) != t->n_dims || json_object_set_new(root, t->name, entry) != 0) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "out of memory for a safetensors header");
    }
    *offset = end;
out:
    json_decref(shape);
    return st;
}

static keel_status add_meta(json_t *root, const struct keel_pair *meta, size_t n, const keel_log *log)
{
    json_t *map = json_object();
    for (size_t i = 0; i < n; i++) {
        if (json_object_set_new(map, meta[i].key, json_string(meta[i].value)) != 0) {
            KEEL_ERROR(log, "cannot write metadata '%s': not UTF-8, or out of memory", meta[i].key);
            json_decref(map);
            return KEEL_ERR_ARG;
        }
    }
    if (json_object_set_new(root, "__metadata__", map) != 0) {
        KEEL_ERROR(log, "out of memory for a safetensors header");
        return KEEL_ERR_NO_MEMORY;
    }
    return KEEL_OK;
}

keel_status keel_st_write_header(FILE *f, const struct keel_st_tensor *tensors, size_t n,
                                 const struct keel_pair *meta, size_t n_meta, const keel_log *log)
{
    keel_status st = KEEL_OK;
    uint64_t offset = 0;
    char *text = NULL;
    json_t *root = json_object();
    if (n_meta > 0) {
        KEEL_TRY(add_meta(root, meta, n_meta, log));
    }
    for (size_t i = 0; i < n; i++) {
        KEEL_TRY(add_entry(root, &tensors[i], &offset, log));
    }
    text = json_dumps(root, JSON_COMPACT);
    if (!text) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "out of memory for a safetensors header");
    }
    const size_t len = strlen(text);
    const uint64_t padded =
        keel_align_up(len, 8); // data then starts at a multiple of 8; spaces, as the format says
    if (padded > MAX_HEADER_BYTES) {
        KEEL_FAIL(log, KEEL_ERR_ARG,
                  "cannot write a safetensors file: a header of %zu bytes is beyond the format's limit", len);
    }
    if (fwrite(&padded, sizeof padded, 1, f) != 1 || fwrite(text, 1, len, f) != len ||
        fwrite("        ", 1, (size_t)padded - len, f) != (size_t)padded - len) {
        KEEL_FAIL(log, KEEL_ERR_IO, "writing a safetensors file failed: %s", strerror(errno));
    }
out:
    free(text);
    json_decref(root);
    return st;
}

keel_status keel_st_write(FILE *f, const struct keel_st_tensor *tensors, size_t n,
                          const struct keel_pair *meta, size_t n_meta, const keel_log *log)
{
    keel_status st = KEEL_OK;
    KEEL_TRY(keel_st_write_header(f, tensors, n, meta, n_meta, log));
    for (size_t i = 0; i < n; i++) {
        uint64_t bytes = types[tensors[i].type].bytes;
        for (uint32_t d = 0; d < tensors[i].n_dims; d++) {
            bytes *= tensors[i].dims[d];
        }
        if (bytes > 0 && fwrite(tensors[i].data, 1, (size_t)bytes, f) != bytes) {
            KEEL_FAIL(log, KEEL_ERR_IO, "writing a safetensors file failed: %s", strerror(errno));
        }
    }
out:
    return st;
}
