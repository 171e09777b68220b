// SPDX-License-Identifier: MIT
// tests/formats_jsonl.c: rows, fields and their errors with file and line.
#include "formats_util.h"

#include <jansson.h>

static const char sample[] = "\xef\xbb\xbf{\"id\": \"a\", \"n\": 1.5, \"i\": -3, \"b\": true, \"l\": [1]}\r\n"
                             "\n"
                             "  \t\r\n"
                             "{\"id\": \"\xc3\xa9\\u0000x\", \"n\": null}"; // no newline at the end

static void test_rows(void **state)
{
    struct memory_log m;
    struct keel_row row;
    const char *s = NULL;
    size_t len;
    double d = 0;
    int64_t i = 0;
    bool b = false;
    json_t *list = NULL;
    (void)state;
    memory_log_init(&m);
    struct keel_jsonl r = keel_jsonl_make((const uint8_t *)sample, sizeof sample - 1, "f.jsonl", &m.log);
    assert_int_equal(keel_jsonl_next(&r, &row), KEEL_OK);
    assert_int_equal(row.line, 1);
    assert_int_equal(keel_row_str(&row, "id", &s, NULL), KEEL_OK);
    assert_string_equal(s, "a");
    assert_true(keel_row_num(&row, "n", &d) == KEEL_OK && d == 1.5);
    assert_true(keel_row_num(&row, "i", &d) == KEEL_OK && d == -3);
    assert_true(keel_row_int(&row, "i", &i) == KEEL_OK && i == -3);
    assert_true(keel_row_bool(&row, "b", &b) == KEEL_OK && b);
    assert_true(keel_row_array(&row, "l", &list) == KEEL_OK && json_array_size(list) == 1);
    json_decref(row.object);
    assert_int_equal(keel_jsonl_next(&r, &row), KEEL_OK);
    assert_int_equal(row.line, 4);
    assert_int_equal(keel_row_str(&row, "id", &s, &len), KEEL_OK);
    assert_int_equal(len, 4); // two bytes of e acute, NUL, x
    d = 7;
    assert_true(keel_row_opt_num(&row, "n", &d) == KEEL_OK && d == 7); // null counts as missing
    assert_true(keel_row_opt_int(&row, "i", &i) == KEEL_OK && keel_row_opt_bool(&row, "b", &b) == KEEL_OK);
    assert_true(keel_row_opt_array(&row, "l", &list) == KEEL_OK &&
                keel_row_opt_str(&row, "s", &s, &len) == KEEL_OK);
    json_decref(row.object);
    assert_int_equal(keel_jsonl_next(&r, &row), KEEL_OK);
    assert_null(row.object);
    assert_int_equal(m.n, 0);
}

static void test_field_errors(void **state)
{
    static const char text[] = "\n{\"x\": {}, \"f\": 2.5}\n";
    struct memory_log m;
    struct keel_row row;
    const char *s;
    double d;
    int64_t i;
    bool b;
    json_t *list;
    (void)state;
    memory_log_init(&m);
    struct keel_jsonl r = keel_jsonl_make((const uint8_t *)text, sizeof text - 1, "f.jsonl", &m.log);
    assert_int_equal(keel_jsonl_next(&r, &row), KEEL_OK);
    assert_int_equal(keel_row_str(&row, "gone", &s, NULL), KEEL_ERR_DATA);
    assert_logged(&m, "f.jsonl:2: ");
    assert_int_equal(keel_row_num(&row, "gone", &d), KEEL_ERR_DATA);
    assert_logged(&m, "\"gone\"");
    assert_int_equal(keel_row_str(&row, "x", &s, NULL), KEEL_ERR_DATA);
    assert_logged(&m, "string");
    assert_int_equal(keel_row_num(&row, "x", &d), KEEL_ERR_DATA);
    assert_logged(&m, "number");
    assert_int_equal(keel_row_int(&row, "f", &i), KEEL_ERR_DATA);
    assert_logged(&m, "integer");
    assert_int_equal(keel_row_bool(&row, "f", &b), KEEL_ERR_DATA);
    assert_logged(&m, "true or false");
    assert_int_equal(keel_row_array(&row, "x", &list), KEEL_ERR_DATA);
    assert_logged(&m, "\"x\"");
    assert_int_equal(keel_row_opt_str(&row, "x", &s, NULL), KEEL_ERR_DATA);
    assert_logged(&m, "f.jsonl:2: ");
    json_decref(row.object);
}

static void test_bad_lines(void **state)
{
    static const struct {
        const char *text, *message;
    } cases[] = {
        { "\n\n{\"a\": \"\xff\"}", "f.jsonl:3: " },
        { "{\"a\": \"\xed\xa0\x80\"}", "UTF-8" },
        { "{\"a\": 1", "f.jsonl:1: " },
        { "{\"a\": 1}}", "f.jsonl:1: " },
        { "{\"a\": 1} {\"a\": 2}", "f.jsonl:1: " },
        { "{\"a\": 1, \"a\": 2}", "f.jsonl:1: " },
        { "{'a': 1}", "f.jsonl:1: " },
        { "{\"a\": NaN}", "f.jsonl:1: " },
        { "{\"a\": 1e999}", "f.jsonl:1: " },
        { "{\"a\": 99999999999999999999}", "f.jsonl:1: " },
        { "[1, 2]", "object" },
        { "\"text\"", "object" },
        { "3", "object" },
        { "\n{\n", "f.jsonl:2: " }, // a pretty-printed object is no line
    };
    struct memory_log m;
    struct keel_row row;
    (void)state;
    memory_log_init(&m);
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        const size_t len = strlen(cases[i].text);
        uint8_t *copy = exact_copy(cases[i].text, len);
        struct keel_jsonl r = keel_jsonl_make(copy, len, "f.jsonl", &m.log);
        assert_int_equal(keel_jsonl_next(&r, &row), KEEL_ERR_DATA);
        assert_null(row.object);
        assert_logged(&m, cases[i].message);
        free(copy);
    }
}

static void test_nested_deep(void **state)
{
    enum { DEPTH = 100000 };
    struct memory_log m;
    struct keel_row row;
    struct keel_text t = { 0 };
    (void)state;
    memory_log_init(&m);
    keel_text_add(&t, "{\"a\":", 5);
    for (int i = 0; i < DEPTH; i++) {
        keel_text_add(&t, "[", 1);
    }
    struct keel_jsonl r = keel_jsonl_make((const uint8_t *)t.data, t.len, "deep.jsonl", &m.log);
    assert_int_equal(keel_jsonl_next(&r, &row), KEEL_ERR_DATA);
    assert_logged(&m, "deep.jsonl:1: ");
    keel_text_finish(&t);
}

static void test_truncated(void **state)
{
    struct memory_log m;
    struct keel_row row;
    (void)state;
    memory_log_init(&m);
    for (size_t n = 0; n <= sizeof sample - 1; n++) {
        uint8_t *copy = exact_copy(sample, n);
        struct keel_jsonl r = keel_jsonl_make(copy, n, "f.jsonl", &m.log);
        keel_status st = KEEL_OK;
        int rows = 0;
        m.n = 0;
        do {
            st = keel_jsonl_next(&r, &row);
            rows += row.object != NULL;
            json_decref(row.object);
        } while (row.object && st == KEEL_OK);
        assert_true(st == KEEL_OK || st == KEEL_ERR_DATA);
        assert_int_equal(m.n, st == KEEL_OK ? 0 : 1);
        assert_true(rows <= 2);
        free(copy);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),      cmocka_unit_test(test_field_errors),
        cmocka_unit_test(test_bad_lines), cmocka_unit_test(test_nested_deep),
        cmocka_unit_test(test_truncated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
