// SPDX-License-Identifier: MIT
// tests/formats_gguf.c: GGUF: what is written is read back; truncated and hostile files are refused with a
// reason.
#include "formats_util.h"

// --- a good file ---------------------------------------------------------------------------------

static const float ramp[64] = { 1, 2, 3 };

static void write_sample(struct keel_text *out)
{
    keel_gguf_writer *w;
    char *mem = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&mem, &len);
    const uint64_t dims_a[] = { 32, 2 }, dims_b[] = { 3 };
    uint8_t q8[68];
    keel_quantize(KEEL_Q8_0, ramp, q8, 64);
    assert_int_equal(keel_gguf_writer_create(&w, NULL), KEEL_OK);
    keel_gguf_put_str(w, "general.architecture", "sample");
    keel_gguf_put_u32(w, "u32", 7);
    keel_gguf_put_i32(w, "i32", -7);
    keel_gguf_put_u64(w, "u64", UINT64_MAX);
    keel_gguf_put_f32(w, "f32", 0.5f);
    keel_gguf_put_bool(w, "yes", true);
    keel_gguf_put_i32s(w, "i32s", (const int32_t[]){ -1, 2, 3 }, 3);
    keel_gguf_put_f32s(w, "f32s", ramp, 3);
    keel_gguf_put_strs(w, "strs", (const char *const[]){ "a", "", "ccc" }, 3);
    keel_gguf_put_strs(w, "none", NULL, 0);
    keel_gguf_put_tensor(w, "a", KEEL_Q8_0, 2, dims_a);
    keel_gguf_put_tensor(w, "b", KEEL_F32, 1, dims_b);
    assert_int_equal(keel_gguf_writer_begin(w, f), KEEL_OK);
    assert_int_equal(keel_gguf_writer_data(w, q8, 30), KEEL_OK); // in two pieces
    assert_int_equal(keel_gguf_writer_data(w, q8 + 30, 38), KEEL_OK);
    assert_int_equal(keel_gguf_writer_data(w, ramp, 12), KEEL_OK);
    assert_int_equal(keel_gguf_writer_end(w), KEEL_OK);
    keel_gguf_writer_destroy(&w);
    assert_int_equal(fclose(f), 0);
    keel_text_add(out, mem, len);
    free(mem);
}

static void check_sample(const keel_gguf *g)
{
    uint64_t u;
    int64_t i;
    double d;
    bool b = false;
    size_t len;
    struct keel_gguf_array a;
    assert_int_equal(keel_gguf_version(g), 3);
    assert_string_equal(keel_gguf_str(g, "general.architecture", &len), "sample");
    assert_int_equal(len, 6);
    assert_true(keel_gguf_u64(g, "u32", &u) && u == 7);
    assert_true(keel_gguf_i64(g, "i32", &i) && i == -7);
    assert_false(keel_gguf_u64(g, "i32", &u));
    assert_true(keel_gguf_u64(g, "u64", &u) && u == UINT64_MAX);
    assert_false(keel_gguf_i64(g, "u64", &i));
    assert_true(keel_gguf_f64(g, "f32", &d) && d == 0.5);
    assert_true(keel_gguf_bool(g, "yes", &b) && b);
    assert_false(keel_gguf_u64(g, "missing", &u) || keel_gguf_u64(g, "f32", &u) ||
                 keel_gguf_bool(g, "u32", &b));
    assert_null(keel_gguf_str(g, "u32", NULL));
    assert_true(keel_gguf_array(g, "i32s", &a) && a.n == 3 && keel_gguf_array_int(&a, 0) == -1);
    assert_true(keel_gguf_array(g, "f32s", &a) && a.n == 3 && keel_gguf_array_num(&a, 2) == 3.0);
    assert_true(keel_gguf_array(g, "strs", &a) && a.n == 3);
    assert_memory_equal(keel_gguf_array_str(&a, 2, &len), "ccc", 3);
    assert_int_equal(len, 3);
    keel_gguf_array_str(&a, 1, &len);
    assert_int_equal(len, 0);
    assert_true(keel_gguf_array(g, "none", &a) && a.n == 0);
    assert_int_equal(keel_gguf_tensor_count(g), 2);
    const struct keel_gguf_tensor *ta = keel_gguf_tensor_find(g, "a"), *tb = keel_gguf_tensor_find(g, "b");
    assert_true(ta == keel_gguf_tensor_at(g, 0) && tb == keel_gguf_tensor_at(g, 1));
    assert_null(keel_gguf_tensor_find(g, "c"));
    assert_true(ta->type == KEEL_Q8_0 && ta->n_dims == 2 && ta->dims[0] == 32 && ta->dims[1] == 2 &&
                ta->dims[2] == 1);
    assert_true(ta->n_elems == 64 && ta->bytes == 68 && tb->bytes == 12);
    assert_memory_equal(tb->data, ramp, 12);
}

static void test_round_trip(void **state)
{
    struct keel_text t = { 0 };
    keel_gguf *g, *again;
    keel_gguf_writer *w;
    char *mem = NULL;
    size_t len = 0;
    (void)state;
    write_sample(&t);
    assert_int_equal(keel_gguf_parse(&g, (uint8_t *)t.data, t.len, "sample", NULL), KEEL_OK);
    check_sample(g);
    // A copy made key by key reads the same.
    FILE *f = open_memstream(&mem, &len);
    assert_int_equal(keel_gguf_writer_create(&w, NULL), KEEL_OK);
    for (size_t i = 0; i < keel_gguf_key_count(g); i++) {
        keel_gguf_put_copy(w, g, i);
    }
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const struct keel_gguf_tensor *x = keel_gguf_tensor_at(g, i);
        keel_gguf_put_tensor(w, x->name, x->type, x->n_dims, x->dims);
    }
    assert_int_equal(keel_gguf_writer_begin(w, f), KEEL_OK);
    for (size_t i = 0; i < keel_gguf_tensor_count(g); i++) {
        const struct keel_gguf_tensor *x = keel_gguf_tensor_at(g, i);
        assert_int_equal(keel_gguf_writer_data(w, x->data, x->bytes), KEEL_OK);
    }
    assert_int_equal(keel_gguf_writer_end(w), KEEL_OK);
    keel_gguf_writer_destroy(&w);
    fclose(f);
    assert_int_equal(len, t.len);
    assert_memory_equal(mem, t.data, len);
    assert_int_equal(keel_gguf_parse(&again, (uint8_t *)mem, len, "again", NULL), KEEL_OK);
    check_sample(again);
    keel_gguf_destroy(&again);
    keel_gguf_destroy(&g);
    free(mem);
    keel_text_finish(&t);
}

static void test_writer_refuses(void **state)
{
    struct memory_log m;
    keel_gguf_writer *w;
    const uint64_t odd[] = { 33 }, zero[] = { 0 }, one[] = { 1 };
    char sink[4096];
    (void)state;
    memory_log_init(&m);
    for (int i = 0; i < 5; i++) {
        FILE *f = fmemopen(sink, sizeof sink, "w");
        assert_int_equal(keel_gguf_writer_create(&w, &m.log), KEEL_OK);
        if (i < 2) {
            keel_gguf_put_tensor(w, "bad", i ? KEEL_F32 : KEEL_Q4_0, 1, i ? zero : odd);
            assert_logged(&m, "'bad'");
        } else if (i == 2) {
            keel_gguf_put_u32(w, "key", 1);
            keel_gguf_put_u32(w, "key", 2);
        } else {
            keel_gguf_put_tensor(w, "t", KEEL_F32, 1, one);
        }
        if (i < 3) {
            assert_int_equal(keel_gguf_writer_begin(w, f), KEEL_ERR_ARG);
        } else {
            assert_int_equal(keel_gguf_writer_begin(w, f), KEEL_OK);
            assert_int_equal(i == 3 ? keel_gguf_writer_end(w) : keel_gguf_writer_data(w, ramp, 8),
                             KEEL_ERR_ARG);
            assert_logged(&m, "'t'");
        }
        if (i == 2) {
            assert_logged(&m, "'key'");
        }
        keel_gguf_writer_destroy(&w);
        fclose(f);
    }
}

// Every prefix is an error that names the file, until only the padding of the last tensor is missing.
static void test_truncated(void **state)
{
    struct keel_text t = { 0 };
    struct memory_log m;
    keel_gguf *g;
    (void)state;
    memory_log_init(&m);
    write_sample(&t);
    for (size_t n = 0; n <= t.len; n++) {
        uint8_t *copy = exact_copy(t.data, n);
        const keel_status st = keel_gguf_parse(&g, copy, n, "short.gguf", &m.log);
        if (n < t.len - 20) { // tensor b has 12 bytes, padded to 32
            assert_int_equal(st, KEEL_ERR_FORMAT);
            assert_null(g);
            assert_logged(&m, "short.gguf");
        } else {
            assert_int_equal(st, KEEL_OK);
            check_sample(g);
            keel_gguf_destroy(&g);
        }
        free(copy);
    }
    keel_text_finish(&t);
}

// Any single damaged byte: an error or a file that can be walked through without harm.
static void test_damaged(void **state)
{
    static const uint8_t values[] = { 0x00, 0x01, 0x7f, 0x80, 0xff };
    struct keel_text t = { 0 };
    struct memory_log m;
    keel_gguf *g;
    (void)state;
    memory_log_init(&m);
    write_sample(&t);
    for (size_t at = 0; at < t.len; at++) {
        for (size_t v = 0; v < KEEL_COUNT(values); v++) {
            uint8_t *copy = exact_copy(t.data, t.len);
            copy[at] = values[v];
            m.n = 0;
            const keel_status st = keel_gguf_parse(&g, copy, t.len, "damaged.gguf", &m.log);
            assert_true(st == KEEL_OK || st == KEEL_ERR_FORMAT || st == KEEL_ERR_UNSUPPORTED);
            assert_int_equal(m.n, st == KEEL_OK ? 0 : 1);
            uint8_t sum = 0;
            for (size_t i = 0; g && i < keel_gguf_tensor_count(g); i++) {
                const struct keel_gguf_tensor *x = keel_gguf_tensor_at(g, i);
                sum = (uint8_t)(sum + x->data[0] + x->data[x->bytes - 1]);
            }
            (void)*(volatile uint8_t *)&sum;
            keel_gguf_destroy(&g);
            free(copy);
        }
    }
    keel_text_finish(&t);
}

// --- hostile files -------------------------------------------------------------------------------

// A file with one key and two tensors of which any field can be wrong.
struct spec {
    const char *case_name, *message;
    keel_status want;
    uint32_t version;
    uint64_t n_tensors, n_keys;
    const char *key, *name2;
    uint64_t key_len; // 0: the true one
    uint32_t key_type;
    const uint8_t *value;
    size_t value_bytes;
    bool key_twice;
    uint32_t n_dims, type;
    uint64_t dims[2], offset2;
};

static void build(struct keel_text *t, const struct spec *s)
{
    keel_text_add(t, "GGUF", 4);
    put_u32(t, s->version ? s->version : 3);
    put_u64(t, s->n_tensors ? s->n_tensors : 2);
    put_u64(t, s->n_keys ? s->n_keys : s->key_twice ? 2 : 1);
    for (int i = 0; i <= (s->key_twice ? 1 : 0); i++) {
        const char *key = s->key ? s->key : "key";
        put_u64(t, s->key_len ? s->key_len : strlen(key));
        keel_text_add(t, key, strlen(key));
        put_u32(t, s->value ? s->key_type : KEEL_GGUF_U8);
        keel_text_add(t, s->value ? s->value : (const uint8_t *)"\1", s->value ? s->value_bytes : 1);
    }
    for (int i = 0; i < 2; i++) {
        put_str(t, i == 0 ? "first" : s->name2 ? s->name2 : "second");
        put_u32(t, s->n_dims ? s->n_dims : 2);
        for (uint32_t d = 0; d < (s->n_dims ? s->n_dims : 2) && d < 4; d++) {
            put_u64(t, d < 2 && i == 0 && (s->dims[0] || s->dims[1]) ? s->dims[d] : d == 0 ? 32 : 1);
        }
        put_u32(t, s->type && i == 0 ? s->type : KEEL_Q4_0);
        put_u64(t, i == 0 ? 0 : s->offset2 ? s->offset2 : 32);
    }
    while (t->len % 32 != 0) {
        keel_text_add(t, "", 1);
    }
    for (int i = 0; i < 64; i++) {
        keel_text_add(t, "\1", 1);
    }
}

#define LE32(x) (x) & 255, (x) >> 8 & 255, 0, 0
#define LE64_SMALL(x) (x) & 255, (x) >> 8 & 255, 0, 0, 0, 0, 0, 0
#define LE64_MAX 255, 255, 255, 255, 255, 255, 255, 255
#define VALUE(key_type_, ...)                                                                      \
    .key_type = key_type_, .value = (const uint8_t[]){ __VA_ARGS__ },                              \
    .value_bytes = sizeof((const uint8_t[]){ __VA_ARGS__ })

static const struct spec cases[] = {
    { "sound", "", KEEL_OK, .version = 3 },
    { "version 1", "version 1", KEEL_ERR_UNSUPPORTED, .version = 1 },
    { "version 4", "version 4", KEEL_ERR_UNSUPPORTED, .version = 4 },
    { "big endian", "big endian", KEEL_ERR_UNSUPPORTED, .version = 3u << 24 },
    { "2^63 tensors", "do not fit", KEEL_ERR_FORMAT, .n_tensors = (uint64_t)1 << 63 },
    { "2^64 - 1 keys", "do not fit", KEEL_ERR_FORMAT, .n_keys = UINT64_MAX },
    { "more keys than there are", "bad.gguf", KEEL_ERR_FORMAT, .n_keys = 3 },
    { "more tensors than there are", "bad.gguf", KEEL_ERR_FORMAT, .n_tensors = 3 },
    { "key length 2^64 - 1", "metadata key", KEEL_ERR_FORMAT, .key_len = UINT64_MAX },
    { "key length wraps the cursor", "metadata key", KEEL_ERR_FORMAT, .key_len = UINT64_MAX - 31 },
    { "key empty", "metadata key", KEEL_ERR_FORMAT, .key = "" },
    { "key not UTF-8", "not UTF-8", KEEL_ERR_FORMAT, .key = "\xc0\x80" },
    { "key twice", "'key' occurs twice", KEEL_ERR_FORMAT, .key_twice = true },
    { "value type 13", "type 13", KEEL_ERR_FORMAT, VALUE(13, 0) },
    { "bool 2", "bool is 2", KEEL_ERR_FORMAT, VALUE(KEEL_GGUF_BOOL, 2) },
    { "string of 2^64 - 1", "key", KEEL_ERR_FORMAT, VALUE(KEEL_GGUF_STR, LE64_MAX) },
    { "array of arrays", "array of arrays", KEEL_ERR_UNSUPPORTED,
      VALUE(KEEL_GGUF_ARRAY, LE32(KEEL_GGUF_ARRAY), LE64_SMALL(1), LE32(4), LE64_SMALL(0)) },
    { "array of type 99", "type 99", KEEL_ERR_FORMAT, VALUE(KEEL_GGUF_ARRAY, LE32(99), LE64_SMALL(1), 0) },
    { "array of 2^64 - 1", "more than fit", KEEL_ERR_FORMAT,
      VALUE(KEEL_GGUF_ARRAY, LE32(KEEL_GGUF_F32), LE64_MAX) },
    { "array of 2^61 + 1 u64, 8 bytes after wrapping", "more than fit", KEEL_ERR_FORMAT,
      VALUE(KEEL_GGUF_ARRAY, LE32(KEEL_GGUF_U64), 1, 0, 0, 0, 0, 0, 0, 32, LE64_SMALL(1)) },
    { "array of 2^64 - 1 strings", "more than fit", KEEL_ERR_FORMAT,
      VALUE(KEEL_GGUF_ARRAY, LE32(KEEL_GGUF_STR), LE64_MAX) },
    { "array with a string of 2^64 - 1", "key", KEEL_ERR_FORMAT,
      VALUE(KEEL_GGUF_ARRAY, LE32(KEEL_GGUF_STR), LE64_SMALL(1), LE64_MAX) },
    { "alignment 33", "general.alignment", KEEL_ERR_FORMAT, .key = "general.alignment",
      VALUE(KEEL_GGUF_U32, LE32(33)) },
    { "alignment 0", "general.alignment", KEEL_ERR_FORMAT, .key = "general.alignment",
      VALUE(KEEL_GGUF_U32, LE32(0)) },
    { "alignment a bool", "general.alignment", KEEL_ERR_FORMAT, .key = "general.alignment",
      VALUE(KEEL_GGUF_BOOL, 1) },
    { "tensor twice", "'first' occurs twice", KEEL_ERR_FORMAT, .name2 = "first" },
    { "tensor name empty", "tensor name", KEEL_ERR_FORMAT, .name2 = "" },
    { "five dimensions", "'first' has 5", KEEL_ERR_FORMAT, .n_dims = 5 },
    { "2^32 - 1 dimensions", "'first'", KEEL_ERR_FORMAT, .n_dims = UINT32_MAX },
    { "dimension zero", "zero", KEEL_ERR_FORMAT, .dims = { 32, 0 } },
    { "dimensions overflow", "too large", KEEL_ERR_FORMAT, .dims = { (uint64_t)1 << 32, (uint64_t)1 << 32 } },
    { "bytes overflow", "'first'", KEEL_ERR_FORMAT, .type = KEEL_F32, .dims = { (uint64_t)1 << 62, 1 } },
    { "row not a multiple of the block", "multiple of 32", KEEL_ERR_FORMAT, .dims = { 48, 1 } },
    { "type Q2_K", "'first' has ggml type 10; keel reads F32", KEEL_ERR_UNSUPPORTED, .type = 10 },
    { "type 2^32 - 1", "4294967295", KEEL_ERR_UNSUPPORTED, .type = UINT32_MAX },
    { "larger than the file", "beyond the end", KEEL_ERR_FORMAT, .dims = { 32, 1000 } },
    { "offset not aligned", "'second': offset 33", KEEL_ERR_FORMAT, .offset2 = 33 },
    { "offset at the end", "beyond the end", KEEL_ERR_FORMAT, .offset2 = 64 },
    { "offset that wraps", "beyond the end", KEEL_ERR_FORMAT, .offset2 = UINT64_MAX - 31 },
    { "tensors overlap", "overlap", KEEL_ERR_FORMAT, .dims = { 32, 2 } },
};

static void test_hostile(void **state)
{
    struct memory_log m;
    (void)state;
    memory_log_init(&m);
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        struct keel_text t = { 0 };
        keel_gguf *g;
        build(&t, &cases[i]);
        uint8_t *copy = exact_copy(t.data, t.len);
        const keel_status st = keel_gguf_parse(&g, copy, t.len, "bad.gguf", &m.log);
        if (st != cases[i].want) {
            fail_msg("case '%s': status %s, message '%s'", cases[i].case_name, keel_status_text(st), m.last);
        }
        if (st == KEEL_OK) {
            assert_int_equal(m.n, 0);
        } else {
            assert_non_null(strstr(m.last, "bad.gguf"));
            assert_logged(&m, cases[i].message);
        }
        keel_gguf_destroy(&g);
        free(copy);
        keel_text_finish(&t);
    }
}

static void test_not_gguf(void **state)
{
    struct memory_log m;
    keel_gguf *g;
    (void)state;
    memory_log_init(&m);
    assert_int_equal(keel_gguf_parse(&g, (const uint8_t *)"PK\3\4 and so on and on", 21, "a.zip", &m.log),
                     KEEL_ERR_FORMAT);
    assert_logged(&m, "a.zip: not a GGUF file");
    assert_null(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_writer_refuses),
        cmocka_unit_test(test_truncated),  cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_hostile),    cmocka_unit_test(test_not_gguf),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
