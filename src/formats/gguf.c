// SPDX-License-Identifier: MIT
// formats/gguf.c: reads GGUF v2/v3 from a byte range: metadata and tensor index, every field checked before
// use. Does not interpret metadata (models room) and does not read tensor data. Source: docs/gguf.md of the
// ggml project.
#include "formats.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "GGUF fields are read in place: little endian hosts only");

#define MAX_NAME_BYTES 65535u
#define MIN_KEY_BYTES 13u    // length, no characters, type, one byte of value
#define MIN_TENSOR_BYTES 32u // length, no characters, one dim, type, offset

struct chunk { // names and strings live here, so that destruction is one short loop
    struct chunk *next;
    size_t used, cap;
    char bytes[];
};

struct key {
    const char *name;
    enum keel_gguf_type type;
    const uint8_t *value; // first byte after the type field
    size_t value_bytes;
    const char *str; // strings only
    size_t str_len;
    struct keel_gguf_array array; // arrays only
};

struct table { // open addressing; slots hold index + 1
    uint32_t *slots;
    uint32_t mask;
};

struct keel_gguf {
    const char *name;
    uint32_t version;
    size_t n_keys, n_tensors;
    struct key *keys;
    struct keel_gguf_tensor *tensors;
    struct table key_table, tensor_table;
    struct chunk *chunks;
};

struct cursor {
    const uint8_t *data;
    size_t len, at;
    const char *name;
    const keel_log *log;
};

static const struct {
    const char *name;
    uint32_t bytes; // 0: variable
} type_info[] = {
    { "u8", 1 },  { "i8", 1 },   { "u16", 2 },    { "i16", 2 },   { "u32", 4 }, { "i32", 4 }, { "f32", 4 },
    { "bool", 1 }, { "string", 0 }, { "array", 0 }, { "u64", 8 }, { "i64", 8 }, { "f64", 8 },
};

// --- small pieces --------------------------------------------------------------------------------

static char *arena_add(struct chunk **chunks, const void *bytes, size_t len)
{
    struct chunk *c = *chunks;
    if (!c || c->cap - c->used < len + 1) {
        const size_t cap = KEEL_MAX(len + 1, (size_t)16384);
        c = malloc(sizeof *c + cap);
        if (!c) {
            return NULL;
        }
        *c = (struct chunk){ .next = *chunks, .cap = cap };
        *chunks = c;
    }
    char *s = c->bytes + c->used;
    if (len > 0) {
        memcpy(s, bytes, len);
    }
    s[len] = 0;
    c->used += len + 1;
    return s;
}

static bool table_make(struct table *t, size_t n)
{
    uint32_t size = 16;
    while (size < 2 * n) {
        size *= 2;
    }
    t->slots = calloc(size, sizeof *t->slots);
    t->mask = size - 1;
    return t->slots != NULL;
}

// The slot that holds `name`, or the free slot where it belongs. `names` points to the first name pointer of
// an array of structs `stride` bytes apart.
static uint32_t *table_slot(const struct table *t, const void *names, size_t stride, const char *name)
{
    uint64_t at = keel_hash(KEEL_HASH_INIT, name, strlen(name));
    for (;; at++) {
        uint32_t *slot = &t->slots[at & t->mask];
        if (*slot == 0) {
            return slot;
        }
        const char *other;
        memcpy(&other, (const char *)names + (size_t)(*slot - 1) * stride, sizeof other);
        if (strcmp(other, name) == 0) {
            return slot;
        }
    }
}

static keel_status truncated(const struct cursor *c, const char *what, uint64_t want)
{
    KEEL_ERROR(c->log,
               "%s: offset %zu: %s needs %" PRIu64 " bytes, the file has %zu left: truncated or damaged",
               c->name, c->at, what, want, c->len - c->at);
    return KEEL_ERR_FORMAT;
}

static keel_status take(struct cursor *c, void *out, size_t bytes, const char *what)
{
    if (bytes > c->len - c->at) {
        return truncated(c, what, bytes);
    }
    memcpy(out, c->data + c->at, bytes);
    c->at += bytes;
    return KEEL_OK;
}

static keel_status take_string(struct cursor *c, const uint8_t **out, size_t *len, const char *what)
{
    uint64_t n;
    keel_status st = take(c, &n, sizeof n, what);
    if (st == KEEL_OK && n > c->len - c->at) {
        st = truncated(c, what, n);
    }
    if (st == KEEL_OK) {
        *out = c->data + c->at;
        *len = (size_t)n;
        c->at += (size_t)n;
    }
    return st;
}

// A metadata key or tensor name: not empty, printable enough for messages and for C strings.
static keel_status take_name(struct cursor *c, struct chunk **chunks, const char **out, const char *what)
{
    keel_status st = KEEL_OK;
    const size_t start = c->at;
    const uint8_t *bytes;
    size_t len;
    KEEL_TRY(take_string(c, &bytes, &len, what));
    if (len == 0 || len > MAX_NAME_BYTES) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: offset %zu: %s has %zu bytes; 1 to %u are allowed", c->name,
                  start, what, len, MAX_NAME_BYTES);
    }
    if (memchr(bytes, 0, len) || !keel_utf8_valid(bytes, len, NULL)) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: offset %zu: %s is not UTF-8 text", c->name, start, what);
    }
    *out = arena_add(chunks, bytes, len);
    if (!*out) {
        KEEL_FAIL(c->log, KEEL_ERR_NO_MEMORY, "%s: out of memory reading %s", c->name, what);
    }
out:
    return st;
}

// --- metadata ------------------------------------------------------------------------------------

static keel_status check_bools(const struct cursor *c, const uint8_t *bytes, uint64_t n, const char *key)
{
    for (uint64_t i = 0; i < n; i++) {
        if (bytes[i] > 1) {
            KEEL_ERROR(c->log, "%s: metadata key '%s': a bool is %u, not 0 or 1", c->name, key, bytes[i]);
            return KEEL_ERR_FORMAT;
        }
    }
    return KEEL_OK;
}

static keel_status take_array(struct cursor *c, struct key *k)
{
    keel_status st = KEEL_OK;
    uint64_t *offsets = NULL;
    uint32_t type;
    uint64_t n;
    KEEL_TRY(take(c, &type, sizeof type, k->name));
    KEEL_TRY(take(c, &n, sizeof n, k->name));
    if (type == KEEL_GGUF_ARRAY) {
        KEEL_FAIL(c->log, KEEL_ERR_UNSUPPORTED,
                  "%s: metadata key '%s' is an array of arrays, which keel does not read", c->name, k->name);
    }
    if (type >= KEEL_COUNT(type_info)) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: metadata key '%s': element type %" PRIu32 " does not exist",
                  c->name, k->name, type);
    }
    const uint32_t least = type == KEEL_GGUF_STR ? 8 : type_info[type].bytes;
    if (n > (c->len - c->at) / least) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT,
                  "%s: offset %zu: metadata key '%s' has %" PRIu64
                  " elements (%s), more than fit in the file",
                  c->name, c->at, k->name, n, type_info[type].name);
    }
    k->array = (struct keel_gguf_array){ .type = (enum keel_gguf_type)type, .n = n, .data = c->data + c->at };
    if (type != KEEL_GGUF_STR) {
        if (type == KEEL_GGUF_BOOL) {
            KEEL_TRY(check_bools(c, k->array.data, n, k->name));
        }
        c->at += (size_t)n * least;
        goto out;
    }
    offsets = malloc(KEEL_MAX((size_t)n, (size_t)1) * sizeof *offsets);
    if (!offsets) {
        KEEL_FAIL(c->log, KEEL_ERR_NO_MEMORY, "%s: metadata key '%s': out of memory", c->name, k->name);
    }
    const size_t start = c->at;
    for (uint64_t i = 0; i < n; i++) {
        const uint8_t *bytes;
        size_t len;
        offsets[i] = c->at - start;
        KEEL_TRY(take_string(c, &bytes, &len, k->name));
    }
    k->array.offsets = offsets;
    offsets = NULL;
out:
    free(offsets);
    return st;
}

static keel_status take_value(struct cursor *c, struct key *k, struct chunk **chunks)
{
    keel_status st = KEEL_OK;
    const uint8_t *bytes;
    if (k->type == KEEL_GGUF_ARRAY) {
        KEEL_TRY(take_array(c, k));
    } else if (k->type == KEEL_GGUF_STR) {
        KEEL_TRY(take_string(c, &bytes, &k->str_len, k->name));
        k->str = arena_add(chunks, bytes, k->str_len);
        if (!k->str) {
            KEEL_FAIL(c->log, KEEL_ERR_NO_MEMORY, "%s: metadata key '%s': out of memory", c->name, k->name);
        }
    } else {
        const uint32_t n = type_info[k->type].bytes;
        if (n > c->len - c->at) {
            return truncated(c, k->name, n);
        }
        if (k->type == KEEL_GGUF_BOOL) {
            KEEL_TRY(check_bools(c, c->data + c->at, 1, k->name));
        }
        c->at += n;
    }
out:
    return st;
}

static keel_status take_keys(struct cursor *c, struct keel_gguf *g, uint64_t n)
{
    keel_status st = KEEL_OK;
    g->keys = calloc((size_t)n + 1, sizeof *g->keys);
    if (!g->keys || !table_make(&g->key_table, (size_t)n)) {
        KEEL_FAIL(c->log, KEEL_ERR_NO_MEMORY, "%s: out of memory for %" PRIu64 " metadata keys", c->name, n);
    }
    for (size_t i = 0; i < n; i++) {
        struct key *k = &g->keys[i];
        uint32_t type;
        KEEL_TRY(take_name(c, &g->chunks, &k->name, "a metadata key"));
        uint32_t *slot = table_slot(&g->key_table, &g->keys[0].name, sizeof *k, k->name);
        if (*slot != 0) {
            KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: metadata key '%s' occurs twice", c->name, k->name);
        }
        KEEL_TRY(take(c, &type, sizeof type, k->name));
        if (type >= KEEL_COUNT(type_info)) {
            KEEL_FAIL(c->log, KEEL_ERR_FORMAT,
                      "%s: offset %zu: metadata key '%s': type %" PRIu32 " does not exist", c->name,
                      c->at - sizeof type, k->name, type);
        }
        k->type = (enum keel_gguf_type)type;
        k->value = c->data + c->at;
        g->n_keys = i + 1; // so that a failure inside the value frees what it allocated
        KEEL_TRY(take_value(c, k, &g->chunks));
        k->value_bytes = (size_t)(c->data + c->at - k->value);
        *slot = (uint32_t)i + 1;
    }
out:
    return st;
}

// --- tensors -------------------------------------------------------------------------------------

static void list_types(char *out, size_t cap)
{
    size_t at = 0;
    out[0] = 0;
    for (uint32_t i = 0; i < 64; i++) {
        const struct keel_dtype_info *info = keel_dtype_info(i);
        if (info && at < cap) {
            at += (size_t)snprintf(out + at, cap - at, "%s%s", at ? " " : "", info->name);
        }
    }
}

// Fills dims, n_elems and bytes.
static keel_status take_shape(struct cursor *c, struct keel_gguf_tensor *t)
{
    keel_status st = KEEL_OK;
    uint32_t type;
    KEEL_TRY(take(c, &t->n_dims, sizeof t->n_dims, t->name));
    if (t->n_dims < 1 || t->n_dims > 4) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: tensor '%s' has %" PRIu32 " dimensions; 1 to 4 are allowed",
                  c->name, t->name, t->n_dims);
    }
    t->n_elems = 1;
    for (uint32_t i = 0; i < 4; i++) {
        t->dims[i] = 1;
        if (i < t->n_dims) {
            KEEL_TRY(take(c, &t->dims[i], sizeof t->dims[i], t->name));
        }
        if (t->dims[i] == 0 || t->dims[i] > (uint64_t)INT64_MAX / t->n_elems) {
            KEEL_FAIL(c->log, KEEL_ERR_FORMAT,
                      "%s: tensor '%s': dimension %" PRIu32 " is %" PRIu64 ", which is %s", c->name, t->name,
                      i, t->dims[i], t->dims[i] == 0 ? "zero" : "too large");
        }
        t->n_elems *= t->dims[i];
    }
    KEEL_TRY(take(c, &type, sizeof type, t->name));
    const struct keel_dtype_info *info = keel_dtype_info(type);
    if (!info) {
        char known[128];
        list_types(known, sizeof known);
        KEEL_FAIL(c->log, KEEL_ERR_UNSUPPORTED, "%s: tensor '%s' has ggml type %" PRIu32 "; keel reads %s",
                  c->name, t->name, type, known);
    }
    if (t->dims[0] % info->block_elems != 0) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT,
                  "%s: tensor '%s' (%s): dimension 0 is %" PRIu64 ", not a multiple of %" PRIu32, c->name,
                  t->name, info->name, t->dims[0], info->block_elems);
    }
    if (t->n_elems / info->block_elems > (uint64_t)INT64_MAX / info->block_bytes) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: tensor '%s' is too large", c->name, t->name);
    }
    t->type = info->type;
    t->bytes = t->n_elems / info->block_elems * info->block_bytes;
out:
    return st;
}

static int by_data(const void *a, const void *b)
{
    const struct keel_gguf_tensor *const *x = a, *const *y = b;
    return ((*x)->data > (*y)->data) - ((*x)->data < (*y)->data);
}

static keel_status check_overlap(const struct cursor *c, const struct keel_gguf *g)
{
    keel_status st = KEEL_OK;
    const struct keel_gguf_tensor **order = malloc((g->n_tensors + 1) * sizeof *order);
    if (!order) {
        KEEL_FAIL(c->log, KEEL_ERR_NO_MEMORY, "%s: out of memory for %zu tensors", c->name, g->n_tensors);
    }
    for (size_t i = 0; i < g->n_tensors; i++) {
        order[i] = &g->tensors[i];
    }
    qsort(order, g->n_tensors, sizeof *order, by_data);
    for (size_t i = 1; i < g->n_tensors; i++) {
        if ((uint64_t)(order[i]->data - order[i - 1]->data) < order[i - 1]->bytes) {
            KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: tensors '%s' and '%s' overlap in the file", c->name,
                      order[i - 1]->name, order[i]->name);
        }
    }
out:
    free(order);
    return st;
}

static keel_status get_alignment(const struct cursor *c, const struct keel_gguf *g, uint64_t *out)
{
    *out = 32;
    enum keel_gguf_type type;
    for (size_t i = 0; i < g->n_keys; i++) {
        if (strcmp(keel_gguf_key_at(g, i, &type), "general.alignment") == 0) {
            if (!keel_gguf_u64(g, "general.alignment", out) || *out < 8 || *out > 1u << 20 ||
                (*out & (*out - 1)) != 0) {
                KEEL_ERROR(c->log, "%s: general.alignment must be a power of two from 8 to 2^20", c->name);
                return KEEL_ERR_FORMAT;
            }
        }
    }
    return KEEL_OK;
}

static keel_status take_tensors(struct cursor *c, struct keel_gguf *g, uint64_t n)
{
    keel_status st = KEEL_OK;
    uint64_t *offsets = NULL;
    uint64_t alignment;
    KEEL_TRY(get_alignment(c, g, &alignment));
    if (n > (c->len - c->at) / MIN_TENSOR_BYTES) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: offset %zu: %" PRIu64 " tensors do not fit in the file",
                  c->name, c->at, n);
    }
    g->tensors = calloc((size_t)n + 1, sizeof *g->tensors);
    offsets = calloc((size_t)n + 1, sizeof *offsets);
    if (!g->tensors || !offsets || !table_make(&g->tensor_table, (size_t)n)) {
        KEEL_FAIL(c->log, KEEL_ERR_NO_MEMORY, "%s: out of memory for %" PRIu64 " tensors", c->name, n);
    }
    for (size_t i = 0; i < n; i++) {
        struct keel_gguf_tensor *t = &g->tensors[i];
        KEEL_TRY(take_name(c, &g->chunks, &t->name, "a tensor name"));
        uint32_t *slot = table_slot(&g->tensor_table, &g->tensors[0].name, sizeof *t, t->name);
        if (*slot != 0) {
            KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: tensor '%s' occurs twice", c->name, t->name);
        }
        *slot = (uint32_t)i + 1;
        KEEL_TRY(take_shape(c, t));
        KEEL_TRY(take(c, &offsets[i], sizeof offsets[i], t->name));
    }
    g->n_tensors = (size_t)n;
    // A file without tensors may end before the padding.
    const uint64_t start = keel_align_up(c->at, alignment);
    const uint64_t room = start < c->len ? c->len - start : 0;
    for (size_t i = 0; i < n; i++) {
        struct keel_gguf_tensor *t = &g->tensors[i];
        if (offsets[i] % alignment != 0) {
            KEEL_FAIL(c->log, KEEL_ERR_FORMAT,
                      "%s: tensor '%s': offset %" PRIu64 " is not a multiple of %" PRIu64, c->name, t->name,
                      offsets[i], alignment);
        }
        if (offsets[i] > room || t->bytes > room - offsets[i]) {
            KEEL_FAIL(c->log, KEEL_ERR_FORMAT,
                      "%s: tensor '%s': %" PRIu64 " bytes at offset %" PRIu64
                      " of the data go beyond the end of the file: "
                      "truncated or damaged",
                      c->name, t->name, t->bytes, offsets[i]);
        }
        t->data = c->data + start + offsets[i];
    }
    KEEL_TRY(check_overlap(c, g));
out:
    free(offsets);
    return st;
}

// --- the file ------------------------------------------------------------------------------------

static keel_status take_header(struct cursor *c, struct keel_gguf *g, uint64_t *n_keys, uint64_t *n_tensors)
{
    keel_status st = KEEL_OK;
    char magic[4];
    KEEL_TRY(take(c, magic, sizeof magic, "the magic number"));
    if (memcmp(magic, "GGUF", 4) != 0) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT, "%s: not a GGUF file (it does not start with \"GGUF\")", c->name);
    }
    KEEL_TRY(take(c, &g->version, sizeof g->version, "the version"));
    if ((g->version & 0xffff) == 0 && g->version != 0) {
        KEEL_FAIL(c->log, KEEL_ERR_UNSUPPORTED, "%s: a big endian GGUF file; convert it to little endian",
                  c->name);
    }
    if (g->version != 2 && g->version != 3) {
        KEEL_FAIL(c->log, KEEL_ERR_UNSUPPORTED, "%s: GGUF version %" PRIu32 "; keel reads versions 2 and 3",
                  c->name, g->version);
    }
    KEEL_TRY(take(c, n_tensors, sizeof *n_tensors, "the tensor count"));
    KEEL_TRY(take(c, n_keys, sizeof *n_keys, "the metadata count"));
    const size_t left = c->len - c->at;
    if (*n_keys > left / MIN_KEY_BYTES || *n_tensors > left / MIN_TENSOR_BYTES || *n_keys > INT32_MAX / 4 ||
        *n_tensors > INT32_MAX / 4) {
        KEEL_FAIL(c->log, KEEL_ERR_FORMAT,
                  "%s: %" PRIu64 " metadata keys and %" PRIu64 " tensors do not fit in %zu bytes", c->name,
                  *n_keys, *n_tensors, c->len);
    }
out:
    return st;
}

keel_status keel_gguf_parse(keel_gguf **out, const uint8_t *data, size_t len, const char *name,
                            const keel_log *log)
{
    keel_status st = KEEL_OK;
    struct cursor c = { .data = data, .len = len, .name = name, .log = log };
    uint64_t n_keys, n_tensors;
    *out = NULL;
    keel_gguf *g = calloc(1, sizeof *g);
    if (!g || !(g->name = arena_add(&g->chunks, name, strlen(name)))) {
        KEEL_FAIL(log, KEEL_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    KEEL_TRY(take_header(&c, g, &n_keys, &n_tensors));
    KEEL_TRY(take_keys(&c, g, n_keys));
    KEEL_TRY(take_tensors(&c, g, n_tensors));
    *out = g;
    g = NULL;
out:
    keel_gguf_destroy(&g);
    return st;
}

void keel_gguf_destroy(keel_gguf **gp)
{
    struct keel_gguf *g = *gp;
    if (!g) {
        return;
    }
    for (size_t i = 0; i < g->n_keys; i++) {
        free((void *)g->keys[i].array.offsets);
    }
    free(g->keys);
    free(g->tensors);
    free(g->key_table.slots);
    free(g->tensor_table.slots);
    while (g->chunks) {
        struct chunk *next = g->chunks->next;
        free(g->chunks);
        g->chunks = next;
    }
    free(g);
    *gp = NULL;
}

// --- questions -----------------------------------------------------------------------------------

const char *keel_gguf_name(const keel_gguf *g)
{
    return g->name;
}

uint32_t keel_gguf_version(const keel_gguf *g)
{
    return g->version;
}

size_t keel_gguf_tensor_count(const keel_gguf *g)
{
    return g->n_tensors;
}

const struct keel_gguf_tensor *keel_gguf_tensor_at(const keel_gguf *g, size_t i)
{
    KEEL_ASSERT(i < g->n_tensors);
    return &g->tensors[i];
}

const struct keel_gguf_tensor *keel_gguf_tensor_find(const keel_gguf *g, const char *name)
{
    const uint32_t i = *table_slot(&g->tensor_table, &g->tensors[0].name, sizeof g->tensors[0], name);
    return i ? &g->tensors[i - 1] : NULL;
}

static const struct key *find_key(const keel_gguf *g, const char *name)
{
    const uint32_t i = *table_slot(&g->key_table, &g->keys[0].name, sizeof g->keys[0], name);
    return i ? &g->keys[i - 1] : NULL;
}

static int64_t read_int(enum keel_gguf_type type, const uint8_t *p)
{
    uint64_t u = 0;
    memcpy(&u, p, type_info[type].bytes);
    switch (type) {
    case KEEL_GGUF_I8:
        return (int8_t)u;
    case KEEL_GGUF_I16:
        return (int16_t)u;
    case KEEL_GGUF_I32:
        return (int32_t)u;
    case KEEL_GGUF_I64:
        return (int64_t)u;
    default:
        return u > (uint64_t)INT64_MAX ? INT64_MAX : (int64_t)u;
    }
}

static double read_float(enum keel_gguf_type type, const uint8_t *p)
{
    float f;
    double d;
    if (type == KEEL_GGUF_F32) {
        memcpy(&f, p, sizeof f);
        return (double)f;
    }
    memcpy(&d, p, sizeof d);
    return d;
}

bool keel_gguf_type_is_int(enum keel_gguf_type type)
{
    return type <= KEEL_GGUF_I32 || type == KEEL_GGUF_U64 || type == KEEL_GGUF_I64;
}

bool keel_gguf_type_is_float(enum keel_gguf_type type)
{
    return type == KEEL_GGUF_F32 || type == KEEL_GGUF_F64;
}

const char *keel_gguf_type_name(enum keel_gguf_type type)
{
    return (unsigned)type < KEEL_COUNT(type_info) ? type_info[type].name : "unknown";
}

bool keel_gguf_u64(const keel_gguf *g, const char *key, uint64_t *out)
{
    const struct key *k = find_key(g, key);
    if (k && k->type == KEEL_GGUF_U64) {
        memcpy(out, k->value, sizeof *out);
        return true;
    }
    int64_t i;
    if (!keel_gguf_i64(g, key, &i) || i < 0) {
        return false;
    }
    *out = (uint64_t)i;
    return true;
}

bool keel_gguf_i64(const keel_gguf *g, const char *key, int64_t *out)
{
    const struct key *k = find_key(g, key);
    if (!k || !keel_gguf_type_is_int(k->type) || (k->type == KEEL_GGUF_U64 && k->value[7] > 127)) {
        return false;
    }
    *out = read_int(k->type, k->value);
    return true;
}

bool keel_gguf_f64(const keel_gguf *g, const char *key, double *out)
{
    const struct key *k = find_key(g, key);
    if (!k || !keel_gguf_type_is_float(k->type)) {
        return false;
    }
    *out = read_float(k->type, k->value);
    return true;
}

bool keel_gguf_bool(const keel_gguf *g, const char *key, bool *out)
{
    const struct key *k = find_key(g, key);
    if (!k || k->type != KEEL_GGUF_BOOL) {
        return false;
    }
    *out = k->value[0] != 0;
    return true;
}

const char *keel_gguf_str(const keel_gguf *g, const char *key, size_t *len)
{
    const struct key *k = find_key(g, key);
    if (!k || k->type != KEEL_GGUF_STR) {
        return NULL;
    }
    if (len) {
        *len = k->str_len;
    }
    return k->str;
}

bool keel_gguf_array(const keel_gguf *g, const char *key, struct keel_gguf_array *out)
{
    const struct key *k = find_key(g, key);
    if (!k || k->type != KEEL_GGUF_ARRAY) {
        return false;
    }
    *out = k->array;
    return true;
}

const char *keel_gguf_array_str(const struct keel_gguf_array *a, uint64_t i, size_t *len)
{
    KEEL_ASSERT(a->type == KEEL_GGUF_STR && i < a->n);
    uint64_t n;
    memcpy(&n, a->data + a->offsets[i], sizeof n);
    *len = (size_t)n;
    return (const char *)a->data + a->offsets[i] + sizeof n;
}

int64_t keel_gguf_array_int(const struct keel_gguf_array *a, uint64_t i)
{
    KEEL_ASSERT((keel_gguf_type_is_int(a->type) || a->type == KEEL_GGUF_BOOL) && i < a->n);
    return read_int(a->type, a->data + i * type_info[a->type].bytes);
}

double keel_gguf_array_num(const struct keel_gguf_array *a, uint64_t i)
{
    KEEL_ASSERT(keel_gguf_type_is_float(a->type) && i < a->n);
    return read_float(a->type, a->data + i * type_info[a->type].bytes);
}

size_t keel_gguf_key_count(const keel_gguf *g)
{
    return g->n_keys;
}

const char *keel_gguf_key_at(const keel_gguf *g, size_t i, enum keel_gguf_type *type)
{
    KEEL_ASSERT(i < g->n_keys);
    if (type) {
        *type = g->keys[i].type;
    }
    return g->keys[i].name;
}

const uint8_t *keel_gguf_key_raw(const keel_gguf *g, size_t i, size_t *bytes)
{
    KEEL_ASSERT(i < g->n_keys);
    *bytes = g->keys[i].value_bytes;
    return g->keys[i].value;
}
