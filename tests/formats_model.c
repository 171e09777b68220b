// SPDX-License-Identifier: MIT
// tests/formats_model.c: a real Gemma 3 GGUF (KEEL_TEST_MODEL; skipped without): every tensor can be
// dequantised to finite numbers, and its tokenizer gives the ids of tests/data/tokens_gemma3.jsonl (from
// SentencePiece and llama.cpp).
#include "formats_util.h"

#include "platform.h"

#include <jansson.h>
#include <math.h>

static keel_gguf *model;

static void test_tensors(void **state)
{
    (void)state;
    assert_string_equal(keel_gguf_str(model, "general.architecture", NULL), "gemma3");
    assert_true(keel_gguf_tensor_count(model) > 100);
    for (size_t i = 0; i < keel_gguf_tensor_count(model); i++) {
        const struct keel_gguf_tensor *t = keel_gguf_tensor_at(model, i);
        const size_t n = (size_t)t->dims[0];
        float *row = malloc(n * sizeof *row);
        keel_dequantize(t->type, t->data + t->bytes - keel_dtype_bytes(t->type, n), row, n); // the last row
        for (size_t k = 0; k < n; k++) {
            if (!isfinite(row[k])) {
                fail_msg("tensor %s, last row, element %zu is %g", t->name, k, (double)row[k]);
            }
        }
        free(row);
        assert_ptr_equal(keel_gguf_tensor_find(model, t->name), t);
    }
}

static void test_tokens(void **state)
{
    struct keel_map map;
    struct keel_row row;
    keel_tokenizer *tok;
    int n = 0;
    (void)state;
    assert_int_equal(keel_tokenizer_create(&tok, model, NULL), KEEL_OK);
    assert_int_equal(keel_map_open(&map, TOKENS_FILE, NULL), KEEL_OK);
    struct keel_jsonl r = keel_jsonl_make(map.data, map.len_bytes, TOKENS_FILE, NULL);
    while (keel_jsonl_next(&r, &row) == KEEL_OK && row.object) {
        struct keel_tokens t = { 0 };
        struct keel_text back = { 0 };
        struct keel_tokenize_params p = { 0 };
        const char *text;
        size_t len;
        json_t *ids;
        assert_int_equal(keel_row_str(&row, "text", &text, &len), KEEL_OK);
        assert_int_equal(keel_row_bool(&row, "special", &p.special), KEEL_OK);
        assert_int_equal(keel_row_array(&row, "ids", &ids), KEEL_OK);
        assert_int_equal(keel_tokenize(tok, text, len, p, &t), KEEL_OK);
        bool same = t.n == json_array_size(ids);
        for (size_t i = 0; same && i < t.n; i++) {
            same = json_integer_value(json_array_get(ids, i)) == t.ids[i];
        }
        if (!same) {
            fail_msg("%s:%llu: other ids", TOKENS_FILE, (unsigned long long)row.line);
        }
        keel_detokenize(tok, t.ids, t.n, &back);
        if (!p.special && !strstr(text, "\xe2\x96\x81")) {
            assert_int_equal(back.len, len);
            assert_memory_equal(back.data, text, len);
        }
        keel_text_finish(&back);
        keel_tokens_finish(&t);
        json_decref(row.object);
        n++;
    }
    assert_true(n >= 90);
    const struct keel_token_ids ids = keel_tokenizer_ids(tok);
    assert_true(ids.bos == 2 && ids.eos == 1 && ids.pad == 0 && ids.unk == 3 && ids.eot == 106);
    assert_int_equal(keel_tokenizer_vocab(tok), 262144);
    keel_tokenizer_destroy(&tok);
    keel_map_close(&map);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_tensors), cmocka_unit_test(test_tokens) };
    struct keel_map map;
    const char *path = keel_env("KEEL_TEST_MODEL");
    if (!path || !path[0]) {
        return 77; // meson: skipped
    }
    if (keel_map_open(&map, path, NULL) != KEEL_OK ||
        keel_gguf_parse(&model, map.data, map.len_bytes, path, NULL) != KEEL_OK) {
        return 1;
    }
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    keel_gguf_destroy(&model);
    keel_map_close(&map);
    return failed;
}
