// SPDX-License-Identifier: MIT
// tests/model_test.c: the models room on small models: errors at opening, ranges of tokens, memory against its plan, prefill
// against decode against score, gradients against central differences.
// Owns no oracle: tests/e2e compares the same code with transformers and peft.
#include "formats_util.h"
#include "model_tiny.h"

#include "gemma3/gemma3.h"

static const char path[] = "model_test.gguf";

static keel_model *loaded(const struct tiny *t)
{
    keel_model *m = NULL;
    tiny_write(t, path);
    assert_int_equal(keel_model_open(&m, path, NULL), KEEL_OK);
    assert_int_equal(keel_model_load(m, dev), KEEL_OK);
    return m;
}

// Token ids of the row: any but control tokens.
static void draw_ids(int32_t *ids, uint32_t n, uint32_t vocab, uint64_t seed)
{
    struct keel_rng rng = keel_rng_make(seed, 2);
    ids[0] = 2;
    for (uint32_t i = 1; i < n; i++) {
        ids[i] = (int32_t)(6 + keel_rng_below(&rng, vocab - 6));
    }
}

// --- opening -------------------------------------------------------------------------------------

static void test_open_errors(void **state)
{
    (void)state;
    const struct {
        struct tiny t;
        keel_status st;
        const char *says;
    } cases[] = {
        { { TINY_DEFAULTS .arch = "llama" }, KEEL_ERR_UNSUPPORTED, "gemma3" },
        { { TINY_DEFAULTS .skip_key = "gemma3.block_count" }, KEEL_ERR_FORMAT, "gemma3.block_count" },
        { { TINY_DEFAULTS .skip_key = "gemma3.embedding_length" }, KEEL_ERR_FORMAT, "gemma3.embedding_length" },
        { { TINY_DEFAULTS .kv_heads = 3 }, KEEL_ERR_FORMAT, "evenly" },
        { { TINY_DEFAULTS .head_dim = 33 }, KEEL_ERR_UNSUPPORTED, "even size" },
        { { TINY_DEFAULTS .eps = 1.0 }, KEEL_ERR_FORMAT, "epsilon" },
        { { TINY_DEFAULTS .skip_tensor = "blk.3.ffn_up.weight" }, KEEL_ERR_FORMAT, "blk.3.ffn_up.weight" },
        { { TINY_DEFAULTS .bad_tensor = "blk.1.attn_q.weight" }, KEEL_ERR_FORMAT, "[64, 129" },
        { { TINY_DEFAULTS .bad_tensor = "blk.1.attn_q.weight" }, KEEL_ERR_FORMAT, "[64, 128]" },
        { { TINY_DEFAULTS .extra = "blk.0.attn_gate.weight" }, KEEL_ERR_UNSUPPORTED, "blk.0.attn_gate.weight" },
        { { TINY_DEFAULTS .extra = "blk.7.attn_norm.weight" }, KEEL_ERR_UNSUPPORTED, "blk.7.attn_norm.weight" },
    };
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        struct memory_log log;
        keel_model *m = NULL;
        memory_log_init(&log);
        tiny_write(&cases[i].t, path);
        assert_int_equal(keel_model_open(&m, path, &log.log), cases[i].st);
        assert_null(m);
        assert_logged(&log, cases[i].says);
    }
}

static void test_nan_weights(void **state)
{
    (void)state;
    struct memory_log log;
    keel_model *m = NULL;
    const struct tiny t = { TINY_DEFAULTS .nan_tensor = "blk.2.ffn_down.weight" };
    memory_log_init(&log);
    tiny_write(&t, path);
    assert_int_equal(keel_model_open(&m, path, &log.log), KEEL_OK);
    assert_int_equal(keel_model_load(m, dev), KEEL_ERR_NUMERIC);
    assert_logged(&log, "blk.2.ffn_down.weight");
    keel_model_close(&m);
}

static void test_targets(void **state)
{
    (void)state;
    struct memory_log log;
    uint32_t bits;
    memory_log_init(&log);
    assert_int_equal(keel_targets_parse("all", &bits, &log.log), KEEL_OK);
    assert_int_equal(bits, 127);
    assert_int_equal(keel_targets_parse("attn_q,ffn_down", &bits, &log.log), KEEL_OK);
    assert_int_equal(bits, 1u << KEEL_ATTN_Q | 1u << KEEL_FFN_DOWN);
    assert_int_equal(keel_targets_parse("all,vision.*", &bits, &log.log), KEEL_OK);
    assert_int_equal(bits, 127 | KEEL_VISION_TARGETS);
    assert_int_equal(keel_targets_parse("vision.attn_q,vision.proj", &bits, &log.log), KEEL_OK);
    assert_int_equal(bits, 1u << KEEL_N_PROJ | 1u << (KEEL_N_PROJ + KEEL_N_VISION_MAPS - 1));
    const char *const bad[] = { "", "attn", "attn_qq", "attn_q,", ",attn_q", "attn_q,,attn_k", "attn_q attn_k", "vision", "vision.",
                                "vision.ffn_gate", "vision.attn_output" };
    for (size_t i = 0; i < KEEL_COUNT(bad); i++) {
        assert_int_equal(keel_targets_parse(bad[i], &bits, &log.log), KEEL_ERR_ARG);
        assert_int_equal(log.n, 1);
        log.n = 0;
    }
}

// --- ranges --------------------------------------------------------------------------------------

static void check_span(const struct keel_batch *b, uint32_t kind, uint32_t t, uint32_t lo, uint32_t hi, uint32_t q_hi)
{
    const struct keel_token_span *s = (const struct keel_token_span *)keel_span_host(b->spans[kind]) + t;
    if (s->lo != lo || s->hi != hi || s->slot != hi - 1 || s->q_lo != hi - 1 || s->q_hi != q_hi) {
        fail_msg("token %u kind %u: sees [%u, %u) at %u, seen by [%u, %u); expected [%u, %u), until %u", t, kind, s->lo, s->hi,
                 s->slot, s->q_lo, s->q_hi, lo, hi, q_hi);
    }
}

struct batch_want {
    struct keel_batch *b;
    const struct keel_gemma3 *c;
};

static void want_batch(struct keel_layout *l, void *user)
{
    const struct batch_want *w = user;
    keel_batch_layout(l, w->b, w->c, 64, 8, 4);
}

static void test_spans(void **state)
{
    (void)state;
    uint8_t kinds[1] = { KEEL_GLOBAL };
    const struct keel_gemma3 c = { .n_layers = 1, .head_dim = 8, .window = 5, .rope_base = { 1e4f, 1e6f },
                                   .rope_factor = { 1, 1 }, .kind = kinds };
    struct keel_batch b;
    keel_heap *heap = NULL;
    int32_t ids[64] = { 0 };
    uint32_t first;
    assert_int_equal(keel_batch_init(&b, &c, NULL), KEEL_OK);
    assert_int_equal(keel_layout_make(&heap, dev, KEEL_HEAP_HOST, "test", want_batch, &(struct batch_want){ &b, &c }), KEEL_OK);
    // Two packed rows of 7 and 4 tokens: neither sees the other; local layers see 5 tokens.
    assert_int_equal(keel_batch_add(&b, &(struct keel_batch_row){ .ids = ids, .n = 7 }, &first), KEEL_OK);
    assert_int_equal(first, 0);
    assert_int_equal(keel_batch_add(&b, &(struct keel_batch_row){ .ids = ids, .n = 4 }, &first), KEEL_OK);
    assert_int_equal(first, 7);
    keel_batch_ready(&b, dev);
    for (uint32_t t = 0; t < 7; t++) {
        check_span(&b, KEEL_GLOBAL, t, 0, t + 1, 7);
        check_span(&b, KEEL_LOCAL, t, t < 5 ? 0 : t - 4, t + 1, KEEL_MIN(t + 5, 7u));
    }
    for (uint32_t t = 7; t < 11; t++) {
        check_span(&b, KEEL_GLOBAL, t, 7, t + 1, 11);
        check_span(&b, KEEL_LOCAL, t, 7, t + 1, 11);
    }
    assert_int_equal(b.group[0].max_span[KEEL_GLOBAL], 7);
    assert_int_equal(b.group[0].max_span[KEEL_LOCAL], 5);
    assert_int_equal(b.group[0].max_union[KEEL_GLOBAL], 8); // tokens 4 to 7 together: [0, 8)
    assert_int_equal(b.group[0].max_q_union[KEEL_GLOBAL], 7);
    // A row goes on at position 20 of a cache.
    keel_batch_clear(&b);
    assert_int_equal(keel_batch_add(&b, &(struct keel_batch_row){ .ids = ids, .n = 3, .pos = 20, .cached = true }, &first), KEEL_OK);
    keel_batch_ready(&b, dev);
    for (uint32_t t = 0; t < 3; t++) {
        check_span(&b, KEEL_GLOBAL, t, 0, 21 + t, 23);
        check_span(&b, KEEL_LOCAL, t, 16 + t, 21 + t, 23);
    }
    const float *cs = keel_span_host(b.rope[KEEL_LOCAL]);
    assert_float_equal(cs[0], cosf(20.0f), 1e-6f);
    assert_float_equal(cs[1], sinf(20.0f), 1e-6f);
    keel_heap_destroy(&heap);
    keel_batch_finish(&b);
}

// --- memory --------------------------------------------------------------------------------------

static void test_plan(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS .width = 256, .ff = 1024, .head_dim = 64, .vocab = 8192, .context = 2048 };
    const char *const kv[] = { NULL, "f16", "q8_0" };
    uint64_t cache[3] = { 0 }, before, now, peak;
    struct keel_plan plan;
    keel_device_memory(dev, &before, &peak);
    keel_model *m = loaded(&t);
    int32_t ids[40];
    draw_ids(ids, 40, t.vocab, 1);
    for (size_t k = 0; k < KEEL_COUNT(kv); k++) {
        keel_session *s = NULL;
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 2048, .n_batch = 128, .kv = kv[k] }), KEEL_OK);
        assert_int_equal(keel_session_append(s, ids, 40), KEEL_OK);
        keel_device_memory(dev, &now, &peak);
        assert_int_equal(keel_model_plan(m, &(struct keel_plan_params){ .n_ctx = 2048, .n_batch = 128, .kv = kv[k] }, &plan), KEEL_OK);
        // The heap of host tables is at least 1 MiB, whatever it holds.
        if (fabs((double)(now - before) / (double)plan.device_bytes - 1.0) > 0.03) {
            fail_msg("kv %s: plan %.2f MB, held %.2f MB", kv[k], (double)plan.device_bytes / 1e6, (double)(now - before) / 1e6);
        }
        for (uint32_t i = 0; i < plan.n_rows; i++) {
            cache[k] += strcmp(plan.row[i].what, "kv cache") == 0 ? plan.row[i].bytes : 0;
        }
        keel_session_destroy(&s);
    }
    assert_int_equal(2 * cache[1], cache[0]);
    const double share = (double)cache[2] / (double)cache[0]; // a head of 64 floats: 18 words, to whole texels 20; rows to 256 bytes
    assert_true(share > 0.311 && share < 0.315);
    assert_int_equal(keel_model_plan(m, &(struct keel_plan_params){ .n_ctx = 64, .kv = "q5_0" }, &plan), KEEL_ERR_ARG);
    keel_model_close(&m);
    keel_device_memory(dev, &now, &peak);
    assert_int_equal(now, before);
}

// --- prefill, decode, score ----------------------------------------------------------------------

enum { N_IDS = 90 }; // far above the window of 12 and the first recorded step's 64

static float logprob(const float *logits, uint32_t vocab, int32_t id)
{
    double sum = 0;
    for (uint32_t v = 0; v < vocab; v++) {
        sum += exp((double)logits[v]);
    }
    return (float)((double)logits[id] - log(sum));
}

static void score_row(keel_session *s, const int32_t *ids, uint32_t n, float *out)
{
    struct keel_score_row row = { .ids = ids, .n = n, .first = 1, .logprobs = out };
    assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_OK);
}

// Differences are those of summation order in fp32 only.
static void assert_close(const float *a, const float *b, uint32_t n, float tol, const char *what)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!(fabsf(a[i] - b[i]) <= tol)) {
            fail_msg("%s: token %u: %g against %g", what, i + 1, (double)a[i], (double)b[i]);
        }
    }
}

// Other tokens in the place of the last one: as if each had been scored by itself, packed with other rows or in parts that are full.
static void test_alternatives(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    keel_model *m = loaded(&t);
    int32_t ids[N_IDS];
    const int32_t alt[2] = { 7, 11 };
    float want[3], got[N_IDS], out[2][2], short_got[N_IDS];
    const uint32_t batches[] = { 256, 64, 13, 6 }, lengths[] = { N_IDS, 79 }; // 78 tokens to pass: six full parts of 13
    draw_ids(ids, N_IDS, t.vocab, 3);
    for (size_t l = 0; l < KEEL_COUNT(lengths); l++) {
        const uint32_t n = lengths[l];
        for (size_t k = 0; k < KEEL_COUNT(batches); k++) {
            keel_session *s = NULL;
            assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = batches[k] }), KEEL_OK);
            for (int a = 0; k == 0 && a < 3; a++) {
                const int32_t keep = ids[n - 1];
                ids[n - 1] = a < 2 ? alt[a] : keep;
                score_row(s, ids, n, got);
                want[a] = got[n - 2];
                ids[n - 1] = keep;
            }
            struct keel_score_row rows[2] = { { .ids = ids, .n = 5, .first = 3, .logprobs = short_got, .alt = alt, .n_alt = 2, .alt_logprobs = out[0] },
                                              { .ids = ids, .n = n, .first = k % 2 ? n - 1 : 3, .logprobs = got, .alt = alt, .n_alt = 2,
                                                .alt_logprobs = out[1] } };
            assert_int_equal(keel_session_score(s, rows, 2, NULL, NULL), KEEL_OK);
            assert_close(out[1], want, 2, 1e-4f, "alternatives");
            assert_close(&got[n - 1 - rows[1].first], &want[2], 1, 1e-4f, "the row's own token");
            rows[1].first = 2; // two alternatives need three tokens before
            assert_int_equal(keel_session_score(s, rows, 2, NULL, NULL), KEEL_ERR_ARG);
            keel_session_destroy(&s);
        }
    }
    keel_model_close(&m);
}

// Rows that begin alike, between others, give what each gives by itself; the shared tokens lie in a cache, which is made only then.
// With batches of 16 the ring of local layers (window 12) is overwritten from row to row.
static void test_shared_prefixes(void **state)
{
    enum { ROWS = 7, SHARED = 80, MOST = 96 };
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    keel_model *m = loaded(&t);
    int32_t ids[ROWS][MOST];
    float want[ROWS][MOST], got[ROWS][MOST];
    struct keel_score_row rows[ROWS];
    draw_ids(ids[0], ROWS * MOST, t.vocab, 3);
    for (uint32_t i = 0; i < ROWS; i++) {
        if (i > 1 && i < ROWS - 1) { // like row 1; the first and the last row stand alone
            memcpy(ids[i], ids[1], SHARED * sizeof *ids[i]);
        }
        // row 3 scores nothing; the prompt of row 4 ends before the shared tokens do
        rows[i] = (struct keel_score_row){ .ids = ids[i], .n = i == 3 ? SHARED + 1 : MOST - i, .first = i == 4 ? SHARED - 3 : SHARED + 1,
                                           .logprobs = got[i] };
    }
    const uint32_t batches[] = { 256, 64, 16 };
    for (size_t k = 0; k < KEEL_COUNT(batches); k++) {
        keel_session *s = NULL;
        uint64_t made, before = 0, after, peak;
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = batches[k] }), KEEL_OK);
        keel_device_memory(dev, &made, &peak);
        for (uint32_t i = 0; i < ROWS; i++) {
            struct keel_score_row row = rows[i];
            row.logprobs = want[i];
            assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_OK);
            if (i == 0) { // now the recorder has the memory of its submissions
                keel_device_memory(dev, &before, &peak);
            }
        }
        keel_device_memory(dev, &after, &peak);
        assert_true(batches[k] < MOST || after == before);
        assert_int_equal(keel_session_score(s, rows, ROWS, NULL, NULL), KEEL_OK);
        keel_device_memory(dev, &after, &peak);
        assert_true(after > (batches[k] < MOST ? made : before)); // single rows longer than a batch need the cache too
        for (uint32_t i = 0; i < ROWS; i++) {
            assert_close(got[i], want[i], rows[i].n - rows[i].first, 1e-4f, "a shared prefix");
        }
        keel_session_destroy(&s);
    }
    keel_model_close(&m);
}

static void test_decode_prefill_score(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    keel_model *m = loaded(&t);
    keel_session *s = NULL;
    int32_t ids[N_IDS];
    float want[N_IDS], got[N_IDS];
    const uint32_t batches[] = { 256, 64, 13, 1 };
    draw_ids(ids, N_IDS, t.vocab, 3);
    for (size_t k = 0; k < KEEL_COUNT(batches); k++) {
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = batches[k] }), KEEL_OK);
        score_row(s, ids, N_IDS, k == 0 ? want : got);
        if (k > 0) {
            assert_close(got, want, N_IDS - 1, 1e-4f, "score in chunks");
        }
        // The same sequence in a prompt of `cut` tokens and then token by token, twice: the second time all steps replay.
        for (uint32_t pass = 0; pass < 2; pass++) {
            const uint32_t cut = 50;
            keel_session_reset(s);
            assert_int_equal(keel_session_append(s, ids, cut), KEEL_OK);
            for (uint32_t i = cut; i < N_IDS; i++) {
                got[i - 1] = logprob(keel_session_logits(s), t.vocab, ids[i]);
                assert_int_equal(keel_session_append(s, &ids[i], 1), KEEL_OK);
                if (i == 70) { // scoring in between leaves the sequence alone
                    float other[N_IDS];
                    score_row(s, ids, N_IDS, other);
                    assert_close(other, want, N_IDS - 1, 1e-4f, "score beside a sequence");
                }
            }
            assert_close(got + cut - 1, want + cut - 1, N_IDS - cut, 1e-4f, pass ? "replayed decode" : "decode");
            assert_int_equal(keel_session_length(s), N_IDS);
            // Taken back and appended again, the ring has wrapped since.
            const uint32_t back = KEEL_MIN(batches[k], 20u);
            assert_int_equal(keel_session_take_back(s, back), KEEL_OK);
            assert_null(keel_session_logits(s));
            for (uint32_t i = N_IDS - back; i < N_IDS - 1; i++) {
                assert_int_equal(keel_session_append(s, &ids[i], 1), KEEL_OK);
                got[i] = logprob(keel_session_logits(s), t.vocab, ids[i + 1]);
            }
            assert_close(got + N_IDS - back, want + N_IDS - back, back - 1, 1e-4f, "after taking back");
            assert_int_equal(keel_session_take_back(s, batches[k] + 1), KEEL_ERR_ARG);
        }
        keel_session_destroy(&s);
    }
    keel_model_close(&m);
}

// What a session of its own draws for one prompt.
static uint32_t continue_alone(keel_session *s, const keel_model *m, const struct keel_generate_row *row, struct keel_sample_params p, int32_t *out)
{
    uint32_t n = 0;
    keel_session_reset(s);
    assert_int_equal(keel_session_append(s, row->ids, row->n), KEEL_OK);
    while (n < row->cap) {
        assert_int_equal(keel_session_sample(s, &p, &out[n]), KEEL_OK);
        if (keel_token_is_end(m, out[n++]) || n == row->cap) {
            break;
        }
        assert_int_equal(keel_session_append(s, &out[n - 1], 1), KEEL_OK);
    }
    return n;
}

static bool count_tokens(void *user, uint64_t done, uint64_t total)
{
    *(uint64_t *)user = done;
    return done <= total;
}

// Packed caches against f32 ones: score in parts, a prompt in parts and decode, many sequences; the ring wraps in all of them.
static void test_packed_caches(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    const struct {
        const char *kv;
        float tol; // some 2.5 times what was measured; keys and values of f16 are off by 2^-11 of each, of q8_0 by 1/254 of the largest of 32
    } types[] = { { "f16", 4e-3f }, { "q8_0", 1e-1f } };
    keel_model *m = loaded(&t);
    int32_t ids[N_IDS], out[2][8];
    float want[N_IDS], got[N_IDS];
    keel_session *s = NULL;
    draw_ids(ids, N_IDS, t.vocab, 3);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = 13 }), KEEL_OK);
    score_row(s, ids, N_IDS, want);
    keel_session_destroy(&s);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .kv = "q4_0" }), KEEL_ERR_ARG);
    for (size_t k = 0; k < KEEL_COUNT(types); k++) {
        float worst = 0;
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = 13, .kv = types[k].kv }), KEEL_OK);
        score_row(s, ids, N_IDS, got);
        assert_close(got, want, N_IDS - 1, types[k].tol, "score");
        for (uint32_t i = 0; i < N_IDS - 1; i++) {
            worst = KEEL_MAX(worst, fabsf(got[i] - want[i]));
        }
        assert_true(worst > types[k].tol / 100); // it is another cache
        assert_int_equal(keel_session_append(s, ids, 50), KEEL_OK);
        for (uint32_t i = 50; i < N_IDS; i++) {
            got[i - 1] = logprob(keel_session_logits(s), t.vocab, ids[i]);
            assert_int_equal(keel_session_append(s, &ids[i], 1), KEEL_OK);
        }
        assert_close(got + 49, want + 49, N_IDS - 50, types[k].tol, "decode");
        struct keel_generate_row rows[2] = { { .ids = ids, .n = 60, .out = out[0], .cap = 8 }, { .ids = ids + 3, .n = 20, .out = out[1], .cap = 8 } };
        const struct keel_sample_params greedy = { KEEL_SAMPLE_DEFAULTS .seed = 1 };
        assert_int_equal(keel_session_generate(s, rows, 2, &greedy, 2, NULL, NULL), KEEL_OK);
        for (uint32_t i = 0; i < 2; i++) {
            int32_t alone[8];
            struct keel_generate_row row = rows[i];
            row.out = alone;
            struct keel_sample_params own = greedy;
            own.seed += i;
            assert_int_equal(keel_session_generate(s, &row, 1, &own, 1, NULL, NULL), KEEL_OK);
            assert_int_equal(row.n_out, rows[i].n_out);
            assert_memory_equal(alone, out[i], row.n_out * sizeof *alone);
        }
        keel_session_destroy(&s);
    }
    keel_model_close(&m);
}

// Many sequences together, short and long (attention in one group and in many), against one at a time.
static void test_generate(void **state)
{
    (void)state;
    enum { ROWS = 7, CAP = 24 };
    const struct tiny t = { TINY_DEFAULTS .context = 512 };
    const struct {
        uint32_t n_batch, n_parallel, longest;
    } cases[] = { { 256, 16, 40 }, { 13, 3, 40 }, { 64, 1, 40 }, { 100, 4, 300 } };
    keel_model *m = loaded(&t);
    for (size_t k = 0; k < KEEL_COUNT(cases); k++) {
        struct keel_sample_params p = { KEEL_SAMPLE_DEFAULTS .seed = 11 };
        struct keel_generate_row row[ROWS];
        int32_t ids[300], out[ROWS][CAP], want[CAP];
        keel_session *s = NULL;
        uint64_t done = 0;
        p.temperature = k == 1 ? 0.0f : 1.0f;
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 400, .n_batch = cases[k].n_batch }), KEEL_OK);
        draw_ids(ids, 300, t.vocab, 17);
        for (uint32_t i = 0; i < ROWS; i++) {
            const uint32_t n = i == 2 ? cases[k].longest : 1 + 5 * i;
            row[i] = (struct keel_generate_row){ .ids = ids + i, .n = KEEL_MIN(n, 300 - i), .out = out[i], .cap = CAP - i };
        }
        assert_int_equal(keel_session_generate(s, row, ROWS, &p, cases[k].n_parallel, NULL, NULL), KEEL_OK);
        for (uint32_t i = 0; i < ROWS; i++) {
            struct keel_sample_params own = p;
            own.seed += i;
            assert_int_equal(continue_alone(s, m, &row[i], own, want), row[i].n_out);
            assert_memory_equal(want, out[i], row[i].n_out * sizeof *want);
        }
        assert_int_equal(keel_session_generate(s, row, ROWS, &p, 2, count_tokens, &done), KEEL_OK);
        assert_int_equal(done, ROWS * CAP - ROWS * (ROWS - 1) / 2);
        row[3].cap = 400;
        assert_int_equal(keel_session_generate(s, row, ROWS, &p, 2, NULL, NULL), KEEL_ERR_DATA);
        keel_session_destroy(&s);
    }
    keel_model_close(&m);
}

static void test_session_limits(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    struct memory_log log;
    keel_model *m = NULL;
    keel_session *s = NULL;
    int32_t ids[40];
    float lp[40];
    memory_log_init(&log);
    tiny_write(&t, path);
    assert_int_equal(keel_model_open(&m, path, &log.log), KEEL_OK);
    assert_int_equal(keel_session_create(&s, m, NULL), KEEL_ERR_ARG); // not loaded
    assert_int_equal(log.n, 1);
    log.n = 0;
    assert_int_equal(keel_model_load(m, dev), KEEL_OK);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 257 }), KEEL_ERR_ARG);
    assert_logged(&log, "256");
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 32 }), KEEL_OK);
    draw_ids(ids, 40, t.vocab, 4);
    assert_int_equal(keel_session_append(s, ids, 33), KEEL_ERR_ARG);
    assert_logged(&log, "32");
    assert_int_equal(keel_session_append(s, ids, 0), KEEL_ERR_ARG);
    log.n = 0;
    struct keel_score_row rows[2] = { { .ids = ids, .n = 5, .first = 1, .logprobs = lp },
                                      { .ids = ids, .n = 40, .first = 1, .logprobs = lp } };
    assert_int_equal(keel_session_score(s, rows, 2, NULL, NULL), KEEL_ERR_DATA);
    assert_logged(&log, "row 2");
    ids[3] = (int32_t)t.vocab;
    assert_int_equal(keel_session_append(s, ids, 5), KEEL_ERR_ARG);
    keel_session_destroy(&s);
    keel_model_close(&m);
}

// --- adapters and gradients ----------------------------------------------------------------------

enum { RANK = 3, N_SEQS = 3 };

// An adapter whose both sides are noise, so that every gradient is alive.
static keel_adapter *noisy_adapter(keel_model *m, uint32_t targets, float *host)
{
    keel_adapter *a = NULL;
    struct keel_rng rng = keel_rng_make(9, 9);
    assert_int_equal(keel_adapter_create(&a, m, RANK, 6.0f, targets, NULL, 5), KEEL_OK);
    memset(host, 0, a->n_floats * sizeof *host);
    for (size_t i = 0; i < (size_t)a->n_layers * KEEL_N_PROJ; i++) {
        const struct keel_span side[2] = { a->pair[i].a, a->pair[i].b };
        for (uint32_t k = 0; k < 2 && a->pair[i].rank > 0; k++) {
            float *p = host + (side[k].offset - a->params.offset) / 4;
            for (uint64_t j = 0; j < (uint64_t)RANK * (k ? a->pair[i].n : a->pair[i].k); j++) {
                p[j] = 0.1f * (float)keel_rng_normal(&rng);
            }
        }
    }
    assert_int_equal(keel_upload(dev, a->params, host, a->n_floats * sizeof *host), KEEL_OK);
    return a;
}

struct train_case {
    keel_model *m;
    keel_trainer *t;
    keel_adapter *a;
    struct keel_span grads;
    struct keel_seq seqs[N_SEQS];
    float *zero;
};

// Loss of all rows, which have one weight here; their gradients into `g` unless NULL.
static double weighted_loss(struct train_case *c, float *g)
{
    double nll;
    uint64_t n;
    assert_int_equal(keel_upload(dev, c->grads, c->zero, c->a->n_floats * 4), KEEL_OK);
    assert_int_equal(keel_trainer_step(c->t, c->a, c->grads, c->seqs, N_SEQS, &nll, &n), KEEL_OK);
    if (g) {
        assert_int_equal(keel_download(dev, g, c->grads, c->a->n_floats * 4), KEEL_OK);
    }
    return nll * (double)c->seqs[0].weight;
}

// Derivative along the gradient's own direction, restricted to one side of one pair: must be its norm.
static void check_direction(struct train_case *c, const float *params, const float *g, struct keel_span side, uint64_t n,
                            const char *what)
{
    const uint64_t at = (side.offset - c->a->params.offset) / 4;
    float *moved = malloc(c->a->n_floats * sizeof *moved);
    double norm = 0, loss[2];
    for (uint64_t j = 0; j < n; j++) {
        norm += (double)g[at + j] * (double)g[at + j];
    }
    norm = sqrt(norm);
    if (!(norm > 1e-5)) {
        fail_msg("%s: gradient norm is %g", what, norm);
    }
    const double step = 2e-2; // rounding of the loss is about 1e-6 of it, the cubic term is small at this step
    for (uint32_t k = 0; k < 2; k++) {
        memcpy(moved, params, c->a->n_floats * sizeof *moved);
        for (uint64_t j = 0; j < n; j++) {
            moved[at + j] += (float)((k ? 1.0 : -1.0) * step * (double)g[at + j] / norm);
        }
        assert_int_equal(keel_upload(dev, c->a->params, moved, c->a->n_floats * 4), KEEL_OK);
        loss[k] = weighted_loss(c, NULL);
    }
    const double diff = (loss[1] - loss[0]) / (2 * step);
    if (fabs(diff - norm) > 0.02 * norm + 2e-3) {
        fail_msg("%s: central difference %g, gradient %g", what, diff, norm);
    }
    assert_int_equal(keel_upload(dev, c->a->params, params, c->a->n_floats * 4), KEEL_OK);
    free(moved);
}

static void test_gradients(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    struct train_case c = { .m = loaded(&t) };
    const uint32_t lens[N_SEQS] = { 30, 9, 21 };
    int32_t ids[N_SEQS][30];
    keel_heap *heap = NULL;
    float *params = malloc(keel_adapter_bytes(c.m, RANK, 127, NULL));
    assert_non_null(params);
    c.a = noisy_adapter(c.m, 127, params);
    float *g = malloc(c.a->n_floats * 4), *parts = calloc(c.a->n_floats, 4);
    c.zero = calloc(c.a->n_floats, 4);
    assert_true(g && parts && c.zero);
    assert_int_equal(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "gradients"), KEEL_OK);
    assert_int_equal(keel_heap_alloc(heap, c.a->n_floats * 4, &c.grads), KEEL_OK);
    assert_int_equal(keel_trainer_create(&c.t, c.m, 60, 30, 60), KEEL_OK);
    for (uint32_t i = 0; i < N_SEQS; i++) {
        draw_ids(ids[i], lens[i], t.vocab, 50 + i);
        c.seqs[i] = (struct keel_seq){ .ids = ids[i], .n = lens[i], .first = 1 + 3 * i, .weight = 0.25f };
    }
    weighted_loss(&c, g);
    // The rows one by one, adding up, give the gradient of the packed batch: rows do not see each other.
    double nll;
    uint64_t n;
    assert_int_equal(keel_upload(dev, c.grads, c.zero, c.a->n_floats * 4), KEEL_OK);
    for (uint32_t i = 0; i < N_SEQS; i++) {
        assert_int_equal(keel_trainer_step(c.t, c.a, c.grads, &c.seqs[i], 1, &nll, &n), KEEL_OK);
        assert_int_equal(n, c.seqs[i].n - c.seqs[i].first);
    }
    assert_int_equal(keel_download(dev, parts, c.grads, c.a->n_floats * 4), KEEL_OK);
    for (uint64_t j = 0; j < c.a->n_floats; j++) {
        assert_true(fabsf(parts[j] - g[j]) <= 1e-4f + 1e-3f * fabsf(g[j]));
    }
    // Raising one row's weight by 0.5 adds twice what that row gave at 0.25.
    float *more = malloc(c.a->n_floats * 4);
    assert_non_null(more);
    assert_int_equal(keel_upload(dev, c.grads, c.zero, c.a->n_floats * 4), KEEL_OK);
    assert_int_equal(keel_trainer_step(c.t, c.a, c.grads, &c.seqs[1], 1, &nll, &n), KEEL_OK);
    assert_int_equal(keel_download(dev, parts, c.grads, c.a->n_floats * 4), KEEL_OK);
    c.seqs[1].weight = 0.75f;
    weighted_loss(&c, more);
    c.seqs[1].weight = 0.25f;
    for (uint64_t j = 0; j < c.a->n_floats; j++) {
        assert_true(fabsf(more[j] - g[j] - 2.0f * parts[j]) <= 1e-4f + 1e-3f * fabsf(g[j]));
    }
    free(more);

    const uint32_t layers[] = { 0, 5 }; // the lowest, whose input needs no gradient; a global one
    for (size_t k = 0; k < KEEL_COUNT(layers); k++) {
        for (uint32_t p = 0; p < KEEL_N_PROJ; p++) {
            const struct keel_lora *pair = &c.a->pair[layers[k] * KEEL_N_PROJ + p];
            char what[64];
            snprintf(what, sizeof what, "layer %u %s A", layers[k], keel_proj_name[p]);
            check_direction(&c, params, g, pair->a, (uint64_t)RANK * pair->k, what);
            what[strlen(what) - 1] = 'B';
            check_direction(&c, params, g, pair->b, (uint64_t)RANK * pair->n, what);
        }
    }
    keel_trainer_destroy(&c.t);
    keel_heap_destroy(&heap);
    keel_adapter_destroy(&c.a);
    keel_model_close(&c.m);
    free(params);
    free(g);
    free(parts);
    free(c.zero);
}

// Both file layouts give back the same numbers; an adapter counts in decode as in score, and its divergence is not zero.
static void test_adapter_files(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    const char *const names[] = { "model_test_lora.gguf", "model_test_lora" };
    keel_model *m = loaded(&t);
    keel_session *s = NULL;
    int32_t ids[40];
    float base[40], with[2][40], kl[40], back[40];
    float *params = malloc(keel_adapter_bytes(m, RANK, 127, NULL));
    keel_adapter *a = noisy_adapter(m, 1u << KEEL_ATTN_V | 1u << KEEL_FFN_UP, params);
    draw_ids(ids, 40, t.vocab, 6);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 64, .n_batch = 64 }), KEEL_OK);
    score_row(s, ids, 40, base);
    for (uint32_t k = 0; k < 2; k++) {
        assert_int_equal(keel_adapter_save(a, m, names[k]), KEEL_OK);
        assert_int_equal(keel_session_add_adapter(s, names[k], 1.0f), KEEL_OK);
        score_row(s, ids, 40, with[k]);
        assert_true(fabsf(with[k][39 - 1] - base[39 - 1]) > 1e-4f);
        keel_session_reset(s);
        assert_int_equal(keel_session_append(s, ids, 20), KEEL_OK);
        assert_int_equal(keel_session_append(s, &ids[20], 1), KEEL_OK);
        assert_float_equal(logprob(keel_session_logits(s), t.vocab, ids[21]), with[k][20], 1e-4f);
        struct keel_kl_row row = { .ids = ids, .n = 40, .first = 1, .kl = kl, .kl_reverse = back };
        assert_int_equal(keel_session_kl(s, &row, 1, NULL, NULL), KEEL_OK);
        for (uint32_t i = 0; i < 39; i++) {
            assert_true(kl[i] > 0.0f && back[i] > 0.0f);
        }
        keel_session_clear_adapters(s);
    }
    assert_memory_equal(with[0], with[1], 39 * sizeof(float));
    score_row(s, ids, 40, kl);
    assert_memory_equal(kl, base, 39 * sizeof(float)); // the base is the base again
    keel_session_destroy(&s);
    keel_adapter_destroy(&a);
    keel_model_close(&m);
    free(params);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open_errors),          cmocka_unit_test(test_nan_weights),
        cmocka_unit_test(test_targets),              cmocka_unit_test(test_spans),
        cmocka_unit_test(test_plan),                 cmocka_unit_test(test_decode_prefill_score),
        cmocka_unit_test(test_alternatives),
        cmocka_unit_test(test_shared_prefixes),
        cmocka_unit_test(test_packed_caches),        cmocka_unit_test(test_generate),
        cmocka_unit_test(test_session_limits),       cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_adapter_files),
    };
    return cmocka_run_group_tests(tests, tiny_open_device, tiny_close_device);
}
