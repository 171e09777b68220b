// SPDX-License-Identifier: MIT
// tests/formats_safetensors.c: safetensors: what is written is read back; truncated and hostile files are
// refused with a reason.
#include "formats_util.h"

static const float values[6] = { 1, -2, 3.5f, 0, 5, 6 };
static const uint16_t halves[3] = { 0x3c00, 0xc000, 0x7bff };

static void write_sample(struct keel_text *out)
{
    char *mem = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&mem, &len);
    const struct keel_st_tensor tensors[] = {
        { .name = "z.weight",
          .type = KEEL_ST_F32,
          .n_dims = 2,
          .dims = { 2, 3 },
          .data = (const uint8_t *)values },
        { .name = "a\"\xc3\xa9",
          .type = KEEL_ST_F16,
          .n_dims = 1,
          .dims = { 3 },
          .data = (const uint8_t *)halves },
        { .name = "empty", .type = KEEL_ST_F32, .n_dims = 2, .dims = { 0, 7 } },
        { .name = "scalar", .type = KEEL_ST_BF16, .data = (const uint8_t *)"\x80\x3f" },
    };
    const struct keel_pair meta[] = { { "format", "pt" }, { "made by", "keel \"x\"" } };
    assert_int_equal(keel_st_write(f, tensors, KEEL_COUNT(tensors), meta, KEEL_COUNT(meta), NULL), KEEL_OK);
    fclose(f);
    keel_text_add(out, mem, len);
    free(mem);
}

static void check_sample(const keel_st *s)
{
    float y[6];
    assert_int_equal(keel_st_count(s), 4);
    assert_string_equal(keel_st_at(s, 0)->name, "a\"\xc3\xa9"); // sorted by name
    const struct keel_st_tensor *z = keel_st_find(s, "z.weight"), *a = keel_st_at(s, 0),
                                *e = keel_st_find(s, "empty");
    assert_true(z->type == KEEL_ST_F32 && z->n_dims == 2 && z->dims[0] == 2 && z->dims[1] == 3 &&
                z->bytes == 24);
    keel_st_to_f32(z, y);
    assert_memory_equal(y, values, sizeof values);
    keel_st_to_f32(a, y);
    assert_true(y[0] == 1.0f && y[1] == -2.0f && y[2] == 65504.0f);
    assert_true(e->n_elems == 0 && e->bytes == 0);
    keel_st_to_f32(keel_st_find(s, "scalar"), y);
    assert_true(y[0] == 1.0f && keel_st_find(s, "scalar")->n_dims == 0);
    assert_null(keel_st_find(s, "y"));
    assert_string_equal(keel_st_meta(s, "format"), "pt");
    assert_string_equal(keel_st_meta(s, "made by"), "keel \"x\"");
    assert_null(keel_st_meta(s, "missing"));
}

static void test_round_trip(void **state)
{
    struct keel_text t = { 0 };
    keel_st *s;
    (void)state;
    write_sample(&t);
    assert_int_equal(keel_st_parse(&s, (uint8_t *)t.data, t.len, "sample", NULL), KEEL_OK);
    assert_true((keel_st_find(s, "z.weight")->data - (uint8_t *)t.data) % 8 == 0);
    check_sample(s);
    keel_st_destroy(&s);
    keel_text_finish(&t);
}

static void test_truncated_and_damaged(void **state)
{
    static const uint8_t bytes[] = { 0x00, 0x20, '"', '9', '}', 0x80, 0xff };
    struct keel_text t = { 0 };
    struct memory_log m;
    keel_st *s;
    (void)state;
    memory_log_init(&m);
    write_sample(&t);
    for (size_t n = 0; n < t.len; n++) {
        uint8_t *copy = exact_copy(t.data, n);
        assert_int_equal(keel_st_parse(&s, copy, n, "short.safetensors", &m.log), KEEL_ERR_FORMAT);
        assert_null(s);
        assert_logged(&m, "short.safetensors");
        free(copy);
    }
    for (size_t at = 0; at < t.len; at++) {
        for (size_t v = 0; v < KEEL_COUNT(bytes); v++) {
            float y[64];
            uint8_t *copy = exact_copy(t.data, t.len);
            copy[at] = bytes[v];
            m.n = 0;
            const keel_status st = keel_st_parse(&s, copy, t.len, "damaged", &m.log);
            assert_true(st == KEEL_OK || st == KEEL_ERR_FORMAT || st == KEEL_ERR_UNSUPPORTED);
            assert_int_equal(m.n, st == KEEL_OK ? 0 : 1);
            for (size_t i = 0; s && i < keel_st_count(s); i++) {
                assert_true(keel_st_at(s, i)->n_elems <= KEEL_COUNT(y));
                keel_st_to_f32(keel_st_at(s, i), y);
            }
            keel_st_destroy(&s);
            free(copy);
        }
    }
    keel_text_finish(&t);
}

// Headers over eight bytes of data.
static const struct {
    const char *header, *message;
    keel_status want;
} cases[] = {
    { "{\"t\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}", "", KEEL_OK },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}   ", "", KEEL_OK },
    { "", "header", KEEL_ERR_FORMAT },
    { "[]", "not a JSON object", KEEL_ERR_FORMAT },
    { "{\"t\":1}", "'t' is not an object", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\"", "header", KEEL_ERR_FORMAT },
    { "{\"t\":{\"shape\":[2],\"data_offsets\":[0,8]}}", "dtype", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F8_E4M3\",\"shape\":[8],\"data_offsets\":[0,8]}}", "F8_E4M3",
      KEEL_ERR_UNSUPPORTED },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", "shape", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", "dimension 0", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", "dimension 0", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", "at most 8",
      KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}", "dimension 1",
      KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[4611686018427387906],\"data_offsets\":[0,8]}}", "dimension 0",
      KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,8]}}", "header",
      KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2]}}", "data_offsets", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", "data_offsets", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,12]}}", "truncated", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", "'t'", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", "'t'", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}", "need 4", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", "after the last", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", "hole", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"u\":{\"dtype\":\"F32\",\"shape\":[1]"
      ","
      "\"data_offsets\":[4,8]}}",
      "overlap", KEEL_ERR_FORMAT },
    { "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"t\":{}}", "header",
      KEEL_ERR_FORMAT },
    { "{\"__metadata__\":[],\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "__metadata__",
      KEEL_ERR_FORMAT },
    { "{\"__metadata__\":{\"k\":1},\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "'k'",
      KEEL_ERR_FORMAT },
};

static void test_hostile(void **state)
{
    struct memory_log m;
    keel_st *s;
    (void)state;
    memory_log_init(&m);
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        struct keel_text t = { 0 };
        put_str(&t, cases[i].header);
        put_u64(&t, 0);
        uint8_t *copy = exact_copy(t.data, t.len);
        const keel_status st = keel_st_parse(&s, copy, t.len, "bad", &m.log);
        if (st != cases[i].want) {
            fail_msg("header %s: status %s, message '%s'", cases[i].header, keel_status_text(st), m.last);
        }
        if (st != KEEL_OK) {
            assert_logged(&m, cases[i].message);
        }
        keel_st_destroy(&s);
        free(copy);
        keel_text_finish(&t);
    }
    static const uint64_t lengths[] = { 1, 100, (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7 };
    for (size_t i = 0; i < KEEL_COUNT(lengths); i++) {
        assert_int_equal(keel_st_parse(&s, (const uint8_t *)&lengths[i], 8, "bad", &m.log), KEEL_ERR_FORMAT);
        assert_logged(&m, "bad");
    }
}

static void test_writer_refuses(void **state)
{
    struct memory_log m;
    char sink[4096];
    const struct keel_st_tensor twice[] = { { .name = "t", .type = KEEL_ST_F32 },
                                            { .name = "t", .type = KEEL_ST_F32 } };
    const struct keel_st_tensor reserved = { .name = "__metadata__", .type = KEEL_ST_F32 };
    const struct keel_st_tensor deep = { .name = "deep",
                                         .type = KEEL_ST_F32,
                                         .n_dims = KEEL_ST_MAX_DIMS + 1 };
    const struct keel_st_tensor huge = { .name = "huge", .type = KEEL_ST_F32, .n_dims = 2,
                                         .dims = { (uint64_t)1 << 40, (uint64_t)1 << 40 } };
    const struct keel_pair meta = { "k", "\xff" };
    (void)state;
    memory_log_init(&m);
    FILE *f = fmemopen(sink, sizeof sink, "w");
    assert_int_equal(keel_st_write_header(f, twice, 2, NULL, 0, &m.log), KEEL_ERR_ARG);
    assert_logged(&m, "'t'");
    assert_int_equal(keel_st_write_header(f, &reserved, 1, NULL, 0, &m.log), KEEL_ERR_ARG);
    assert_logged(&m, "__metadata__");
    assert_int_equal(keel_st_write_header(f, &deep, 1, NULL, 0, &m.log), KEEL_ERR_ARG);
    assert_logged(&m, "'deep'");
    assert_int_equal(keel_st_write_header(f, &huge, 1, NULL, 0, &m.log), KEEL_ERR_ARG);
    assert_logged(&m, "'huge'");
    assert_int_equal(keel_st_write_header(f, twice, 1, &meta, 1, &m.log), KEEL_ERR_ARG);
    assert_logged(&m, "'k'");
    fclose(f);
}

static void test_types(void **state)
{
    static const uint8_t b[8] = { 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
    static const struct {
        enum keel_st_type type;
        float want;
    } all[] = { { KEEL_ST_U8, 254 },
                { KEEL_ST_I8, -2 },
                { KEEL_ST_U16, 65534 },
                { KEEL_ST_I16, -2 },
                { KEEL_ST_U32, 4294967296.f },
                { KEEL_ST_I32, -2 },
                { KEEL_ST_U64, 18446744073709551616.f },
                { KEEL_ST_I64, -2 } };
    const double d = 0.1;
    float y;
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(all); i++) {
        const struct keel_st_tensor t = { .type = all[i].type, .n_elems = 1, .data = b };
        keel_st_to_f32(&t, &y);
        assert_true(y == all[i].want);
    }
    const struct keel_st_tensor t = { .type = KEEL_ST_F64, .n_elems = 1, .data = (const uint8_t *)&d };
    keel_st_to_f32(&t, &y);
    assert_true(y == 0.1f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_truncated_and_damaged),
        cmocka_unit_test(test_hostile),    cmocka_unit_test(test_writer_refuses),
        cmocka_unit_test(test_types),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
