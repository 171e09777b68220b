// SPDX-License-Identifier: MIT
// tests/formats_tokenizer.c: the tokenizer on a vocabulary small enough to work out by hand: order of merges,
// whole pieces, byte fallback, control tokens, errors; and round trips of random text. Gemma's own
// vocabulary: formats_model.c.
#include "formats_util.h"

#include <math.h>

enum {
    PAD,
    EOS,
    BOS,
    UNK,
    BYTE0,
    SP = BYTE0 + 256,
    A,
    B,
    C,
    AB,
    BC,
    AA,
    SPSPA,
    SPSP,
    NL,
    NLNL,
    EOT,
    EACUTE,
    N_TOKENS
};

struct vocab {
    const char *text[N_TOKENS];
    float score[N_TOKENS];
    int32_t type[N_TOKENS];
    char byte_names[256][8];
};

static void set(struct vocab *v, int id, const char *text, float score, int32_t type)
{
    v->text[id] = text;
    v->score[id] = score;
    v->type[id] = type;
}

static void make_vocab(struct vocab *v)
{
    memset(v, 0, sizeof *v);
    set(v, PAD, "<pad>", -1000, 3);
    set(v, EOS, "<eos>", -1000, 3);
    set(v, BOS, "<bos>", -1000, 3);
    set(v, UNK, "<unk>", -1000, 2);
    for (int i = 0; i < 256; i++) {
        snprintf(v->byte_names[i], sizeof v->byte_names[i], "<0x%02X>", (unsigned)i);
        set(v, BYTE0 + i, v->byte_names[i], 0, 6);
    }
    set(v, SP, "\xe2\x96\x81", -20, 1);
    set(v, A, "a", -21, 1);
    set(v, B, "b", -22, 1);
    set(v, C, "c", -23, 1);
    set(v, AB, "ab", -10, 1);
    set(v, BC, "bc", -10, 1);
    set(v, AA, "aa", -12, 1);
    set(v, SPSPA, "\xe2\x96\x81\xe2\x96\x81" "a", -1, 1);
    set(v, SPSP, "  ", -1000, 4);
    set(v, NL, "\n", -1000, 4);
    set(v, NLNL, "\n\n", -1000, 4);
    set(v, EOT, "<end_of_turn>", -1000, 3);
    set(v, EACUTE, "\xc3\xa9", -24, 1);
}

struct options {
    const char *model;  // NULL: "llama"; "": none
    size_t n_tokens, n_scores, n_types; // 0: all
    bool space_prefix;
    int64_t bos; // 0: BOS
    bool no_unk;
};

static keel_status make(keel_tokenizer **tok, const struct vocab *v, struct options o, const keel_log *log)
{
    keel_gguf_writer *w;
    keel_gguf *g;
    char *mem = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&mem, &len);
    assert_int_equal(keel_gguf_writer_create(&w, NULL), KEEL_OK);
    if (!o.model || o.model[0]) {
        keel_gguf_put_str(w, "tokenizer.ggml.model", o.model ? o.model : "llama");
    }
    keel_gguf_put_strs(w, "tokenizer.ggml.tokens", v->text, o.n_tokens ? o.n_tokens : N_TOKENS);
    keel_gguf_put_f32s(w, "tokenizer.ggml.scores", v->score, o.n_scores ? o.n_scores : N_TOKENS);
    if (o.n_types != SIZE_MAX) {
        keel_gguf_put_i32s(w, "tokenizer.ggml.token_type", v->type, o.n_types ? o.n_types : N_TOKENS);
    }
    keel_gguf_put_i32(w, "tokenizer.ggml.bos_token_id", o.bos ? (int32_t)o.bos : BOS);
    keel_gguf_put_u32(w, "tokenizer.ggml.eos_token_id", EOS);
    if (!o.no_unk) {
        keel_gguf_put_u32(w, "tokenizer.ggml.unknown_token_id", UNK);
    }
    keel_gguf_put_bool(w, "tokenizer.ggml.add_space_prefix", o.space_prefix);
    assert_int_equal(keel_gguf_writer_begin(w, f), KEEL_OK);
    assert_int_equal(keel_gguf_writer_end(w), KEEL_OK);
    keel_gguf_writer_destroy(&w);
    fclose(f);
    assert_int_equal(keel_gguf_parse(&g, (uint8_t *)mem, len, "vocab.gguf", NULL), KEEL_OK);
    const keel_status st = keel_tokenizer_create(tok, g, log);
    keel_gguf_destroy(&g);
    memset(mem, 0xa5, len); // the tokenizer must own what it keeps
    free(mem);
    return st;
}

static void check(const keel_tokenizer *tok, const char *text, size_t len, struct keel_tokenize_params p,
                  const int32_t *want, size_t n)
{
    struct keel_tokens t = { 0 };
    uint8_t *copy = exact_copy(text, len);
    assert_int_equal(keel_tokenize(tok, (char *)copy, len, p, &t), KEEL_OK);
    bool same = t.n == n;
    for (size_t i = 0; same && i < n; i++) {
        same = t.ids[i] == want[i];
    }
    if (!same) {
        for (size_t i = 0; i < t.n; i++) {
            print_message("%d (%s)\n", t.ids[i], keel_token_name(tok, t.ids[i]));
        }
        fail_msg("'%s' has other tokens: see above", text);
    }
    free(copy);
    keel_tokens_finish(&t);
}

#define PLAIN ((struct keel_tokenize_params){ 0 })
#define SPECIAL ((struct keel_tokenize_params){ .special = true })
#define CHECK(text, params, ...)                                                                   \
    check(tok, text, sizeof(text) - 1, params, (const int32_t[]){ __VA_ARGS__ },                   \
          KEEL_COUNT(((const int32_t[]){ __VA_ARGS__ })))

static void test_merges(void **state)
{
    struct vocab v;
    keel_tokenizer *tok;
    (void)state;
    make_vocab(&v);
    assert_int_equal(make(&tok, &v, (struct options){ 0 }, NULL), KEEL_OK);
    CHECK("abc", PLAIN, AB, C);    // equal scores: leftmost
    CHECK("bcab", PLAIN, BC, AB);
    CHECK("aab", PLAIN, A, AB);    // better score before leftmost
    CHECK("aaa", PLAIN, AA, A);
    CHECK("aaaab", PLAIN, AA, A, AB);
    CHECK(" a", PLAIN, SP, A);
    CHECK("  a", PLAIN, SPSP, A);  // a whole piece does not merge, though "▁▁a" has the best score
    CHECK("   a", PLAIN, SPSP, SP, A);
    CHECK("\n\n\na", PLAIN, NLNL, NL, A); // longest first, from the left
    CHECK("\xc3\xa9", PLAIN, EACUTE);
    CHECK("x", PLAIN, BYTE0 + 'x');
    CHECK("a\xe2\x82\xac" "b", PLAIN, A, BYTE0 + 0xe2, BYTE0 + 0x82, BYTE0 + 0xac, B);
    CHECK("a\0b", PLAIN, A, BYTE0, B);
    CHECK("a", ((struct keel_tokenize_params){ .bos = true }), BOS, A);
    check(tok, "", 0, PLAIN, NULL, 0);
    CHECK("", ((struct keel_tokenize_params){ .bos = true }), BOS);
    keel_tokenizer_destroy(&tok);
}

static void test_control(void **state)
{
    struct vocab v;
    keel_tokenizer *tok;
    struct keel_tokens t = { 0 };
    size_t len;
    (void)state;
    make_vocab(&v);
    assert_int_equal(make(&tok, &v, (struct options){ 0 }, NULL), KEEL_OK);
    CHECK("a<end_of_turn>\n<bos>", SPECIAL, A, EOT, NL, BOS);
    CHECK("<end_of_turn", SPECIAL, BYTE0 + '<', BYTE0 + 'e', BYTE0 + 'n', BYTE0 + 'd', BYTE0 + '_',
          BYTE0 + 'o', BYTE0 + 'f', BYTE0 + '_', BYTE0 + 't', BYTE0 + 'u', BYTE0 + 'r', BYTE0 + 'n');
    CHECK("<bos>", PLAIN, BYTE0 + '<', B, BYTE0 + 'o', BYTE0 + 's', BYTE0 + '>');
    CHECK("<0x0A>", SPECIAL, BYTE0 + '<', BYTE0 + '0', BYTE0 + 'x', BYTE0 + '0', BYTE0 + 'A',
          BYTE0 + '>'); // bytes never match
    assert_int_equal(keel_tokenize(tok, "<end_of_turn>", 13, PLAIN, &t), KEEL_OK);
    for (size_t i = 0; i < t.n; i++) {
        assert_false(keel_token_is_control(tok, t.ids[i]));
    }
    keel_tokens_finish(&t);
    const struct keel_token_ids ids = keel_tokenizer_ids(tok);
    assert_true(ids.bos == BOS && ids.eos == EOS && ids.pad == -1 && ids.unk == UNK && ids.eot == EOT);
    assert_true(keel_tokenizer_is_eog(tok, EOS) && keel_tokenizer_is_eog(tok, EOT) &&
                !keel_tokenizer_is_eog(tok, A));
    assert_false(keel_tokenizer_is_eog(tok, -1));
    assert_int_equal(keel_tokenizer_vocab(tok), N_TOKENS);
    assert_int_equal(keel_token_find(tok, "ab"), AB);
    assert_int_equal(keel_token_find(tok, "<bos>"), BOS);
    assert_int_equal(keel_token_find(tok, "<0x41>"), BYTE0 + 0x41);
    assert_int_equal(keel_token_find(tok, "nope"), -1);
    assert_string_equal(keel_token_name(tok, AB), "ab");
    assert_memory_equal(keel_token_bytes(tok, BYTE0 + 0x41, &len), "A", 1);
    assert_memory_equal(keel_token_bytes(tok, SPSPA, &len), "  a", 3);
    assert_int_equal(len, 3);
    keel_token_bytes(tok, EOT, &len);
    assert_int_equal(len, 0);
    keel_tokenizer_destroy(&tok);
}

static void test_space_prefix(void **state)
{
    struct vocab v;
    keel_tokenizer *tok;
    struct keel_text out = { 0 };
    (void)state;
    make_vocab(&v);
    assert_int_equal(make(&tok, &v, (struct options){ .space_prefix = true }, NULL), KEEL_OK);
    CHECK("b", PLAIN, SP, B);
    check(tok, "", 0, PLAIN, NULL, 0);
    keel_detokenize(tok, (const int32_t[]){ SP, B }, 2, &out);
    assert_string_equal(out.data, "b");
    keel_text_finish(&out);
    keel_tokenizer_destroy(&tok);
}

static void test_invalid_utf8(void **state)
{
    static const struct {
        const char *text, *message;
    } cases[] = { { "ab\xff", "2" },         { "\xc3", "0" },          { "a\xed\xa0\x80", "1" },
                  { "abc\xf4\x90\x80\x80", "3" }, { "\xc0\xaf", "0" },      { "abcd\xe2\x82", "4" } };
    struct vocab v;
    struct memory_log m;
    keel_tokenizer *tok;
    struct keel_tokens t = { 0 };
    (void)state;
    memory_log_init(&m);
    make_vocab(&v);
    assert_int_equal(make(&tok, &v, (struct options){ 0 }, &m.log), KEEL_OK);
    assert_int_equal(keel_tokens_add(&t, 5), KEEL_OK);
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        const size_t len = strlen(cases[i].text);
        uint8_t *copy = exact_copy(cases[i].text, len);
        assert_int_equal(
            keel_tokenize(tok, (char *)copy, len, (struct keel_tokenize_params){ .bos = true }, &t),
            KEEL_ERR_DATA);
        assert_int_equal(t.n, 1);
        assert_non_null(strstr(m.last, "UTF-8"));
        assert_logged(&m, cases[i].message);
        free(copy);
    }
    keel_tokens_finish(&t);
    keel_tokenizer_destroy(&tok);
}

// A code point that UTF-8 can carry.
static uint32_t random_char(struct keel_rng *rng)
{
    static const uint32_t top[] = { 0x80, 0x800, 0x10000, 0x110000 };
    static const char common[] = "abc  \n";
    if (keel_rng_below(rng, 2)) {
        return (uint8_t)common[keel_rng_below(rng, sizeof common - 1)];
    }
    const uint32_t c = keel_rng_below(rng, top[keel_rng_below(rng, 4)]);
    // Surrogates are no characters; U+2581 decodes to a space by design.
    return (c >= 0xd800 && c < 0xe000) || c == 0x2581 ? 'a' : c;
}

static void add_utf8(struct keel_text *t, uint32_t c)
{
    const uint8_t b[4] = { (uint8_t)(c < 0x80      ? c
                                     : c < 0x800   ? 0xc0 | c >> 6
                                     : c < 0x10000 ? 0xe0 | c >> 12
                                                   : 0xf0 | c >> 18) };
    const int more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    keel_text_add(t, b, 1);
    for (int i = more - 1; i >= 0; i--) {
        const uint8_t x = (uint8_t)(0x80 | (c >> (6 * i) & 63));
        keel_text_add(t, &x, 1);
    }
}

static void test_round_trip(void **state)
{
    struct vocab v;
    keel_tokenizer *tok;
    struct keel_rng rng = keel_rng_make(11, 0);
    (void)state;
    make_vocab(&v);
    assert_int_equal(make(&tok, &v, (struct options){ 0 }, NULL), KEEL_OK);
    for (int k = 0; k < 2000; k++) {
        struct keel_text text = { 0 }, back = { 0 };
        struct keel_tokens t = { 0 };
        const uint32_t n = 1 + keel_rng_below(&rng, 60);
        for (uint32_t i = 0; i < n; i++) {
            add_utf8(&text, random_char(&rng));
        }
        assert_int_equal(keel_tokenize(tok, text.data, text.len, PLAIN, &t), KEEL_OK);
        keel_detokenize(tok, t.ids, t.n, &back);
        assert_int_equal(back.len, text.len);
        assert_memory_equal(back.data, text.data, text.len);
        keel_text_finish(&text);
        keel_text_finish(&back);
        keel_tokens_finish(&t);
    }
    keel_tokenizer_destroy(&tok);
}

// A million characters of one word: quadratic work would take minutes, so meson's timeout is the check.
static void test_long_word(void **state)
{
    enum { LEN = 1 << 20 };
    struct vocab v;
    keel_tokenizer *tok;
    struct keel_tokens t = { 0 };
    char *text = malloc(LEN);
    (void)state;
    make_vocab(&v);
    assert_int_equal(make(&tok, &v, (struct options){ 0 }, NULL), KEEL_OK);
    memset(text, 'a', LEN);
    assert_int_equal(keel_tokenize(tok, text, LEN, PLAIN, &t), KEEL_OK);
    assert_int_equal(t.n, LEN / 2);
    assert_true(t.ids[0] == AA && t.ids[t.n - 1] == AA);
    keel_tokens_finish(&t);
    memset(text, '<', LEN); // begins a control token everywhere
    assert_int_equal(keel_tokenize(tok, text, LEN, SPECIAL, &t), KEEL_OK);
    assert_int_equal(t.n, LEN);
    keel_tokens_finish(&t);
    free(text);
    keel_tokenizer_destroy(&tok);
}

static void test_bad_vocabularies(void **state)
{
    static const struct {
        struct options o;
        int token;
        float score;
        int32_t type;
        const char *text, *message;
        keel_status want;
    } cases[] = {
        { .o.model = "", .message = "tokenizer.ggml.model is missing", .want = KEEL_ERR_FORMAT },
        { .o.model = "gpt2", .message = "'gpt2'", .want = KEEL_ERR_UNSUPPORTED },
        { .o.n_scores = 7, .message = "scores", .want = KEEL_ERR_FORMAT },
        { .o.n_types = 7, .message = "token_type", .want = KEEL_ERR_FORMAT },
        { .o.n_types = SIZE_MAX, .message = "token_type", .want = KEEL_ERR_FORMAT },
        { .o.n_tokens = 7, .message = "scores", .want = KEEL_ERR_FORMAT },
        { .o.bos = N_TOKENS, .message = "bos_token_id", .want = KEEL_ERR_FORMAT },
        { .o.bos = -5, .message = "bos_token_id", .want = KEEL_ERR_FORMAT },
        { .token = A,
          .text = "a",
          .score = NAN,
          .type = 1,
          .message = "not a number",
          .want = KEEL_ERR_FORMAT },
        { .token = A, .text = "a", .type = 7, .message = "type 7", .want = KEEL_ERR_FORMAT },
        { .token = A, .text = "a", .type = -1, .message = "type -1", .want = KEEL_ERR_FORMAT },
        { .token = A,
          .text = "a\xff",
          .type = 1,
          .message = "token 261 is not valid UTF-8",
          .want = KEEL_ERR_FORMAT },
        { .token = BYTE0 + 1, .text = "<0x+1>", .type = 6, .message = "<0xXX>", .want = KEEL_ERR_FORMAT },
        { .o.no_unk = true,
          .token = BYTE0 + 0x41,
          .text = "q",
          .type = 1,
          .message = "<0x41>",
          .want = KEEL_ERR_FORMAT },
    };
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        struct vocab v;
        struct memory_log m;
        keel_tokenizer *tok;
        memory_log_init(&m);
        make_vocab(&v);
        if (cases[i].text) {
            set(&v, cases[i].token, cases[i].text, cases[i].score, cases[i].type);
        }
        const keel_status st = make(&tok, &v, cases[i].o, &m.log);
        if (st != cases[i].want) {
            fail_msg("case %zu (%s): status %s", i, cases[i].message, keel_status_text(st));
        }
        assert_null(tok);
        assert_non_null(strstr(m.last, "vocab.gguf"));
        assert_logged(&m, cases[i].message);
    }
}

// Without a byte token the whole character is one unknown.
static void test_unknown(void **state)
{
    struct vocab v;
    keel_tokenizer *tok;
    (void)state;
    make_vocab(&v);
    set(&v, BYTE0 + 0xe2, "q", -30, 1);
    assert_int_equal(make(&tok, &v, (struct options){ 0 }, NULL), KEEL_OK);
    CHECK("a\xe2\x82\xac" "b", PLAIN, A, UNK, B);
    keel_tokenizer_destroy(&tok);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merges),           cmocka_unit_test(test_control),
        cmocka_unit_test(test_space_prefix),     cmocka_unit_test(test_invalid_utf8),
        cmocka_unit_test(test_round_trip),       cmocka_unit_test(test_long_word),
        cmocka_unit_test(test_bad_vocabularies), cmocka_unit_test(test_unknown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
