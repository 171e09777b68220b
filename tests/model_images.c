// SPDX-License-Identifier: MIT
// tests/model_images.c: rows with images in the models room: who sees whom against the definition of the mask, prefill in parts
// against one pass, gradients of adapters and of the images' embeddings against central differences.
// Owns no oracle: tests/e2e/test_images.py compares the same code with transformers and peft.
#include "formats_util.h"
#include "model_tiny.h"

#include "gemma3/gemma3.h"

#include <stdio.h>

static const char path[] = "model_images_test.gguf";

enum { WIDTH = 64, N_ROW = 60, N_SOFT = 19 }; // an image is longer than the window of 12

static keel_model *loaded(const struct tiny *t)
{
    keel_model *m = NULL;
    tiny_write(t, path);
    assert_int_equal(keel_model_open(&m, path, NULL), KEEL_OK);
    assert_int_equal(keel_model_load(m, dev), KEEL_OK);
    return m;
}

static void draw_ids(int32_t *ids, uint32_t n, uint64_t seed)
{
    struct keel_rng rng = keel_rng_make(seed, 2);
    ids[0] = 2;
    for (uint32_t i = 1; i < n; i++) {
        ids[i] = (int32_t)(6 + keel_rng_below(&rng, 290));
    }
}

static void draw_embeds(float *e, uint32_t n, uint64_t seed)
{
    struct keel_rng rng = keel_rng_make(seed, 3);
    for (uint32_t i = 0; i < n * WIDTH; i++) {
        e[i] = (float)keel_rng_normal(&rng);
    }
}

// --- ranges --------------------------------------------------------------------------------------

struct batch_want {
    struct keel_batch *b;
    const struct keel_gemma3 *c;
};

static void want_batch(struct keel_layout *l, void *user)
{
    const struct batch_want *w = user;
    keel_batch_layout(l, w->b, w->c, 64, 8, 4);
}

// Number of the image that token i of the row lies in, or -1.
static int image_of(const struct keel_image_tokens *im, uint32_t n, uint32_t i)
{
    for (uint32_t k = 0; k < n; k++) {
        if (i >= im[k].at && i < im[k].at + im[k].n) {
            return (int)k;
        }
    }
    return -1;
}

// The definition: (causal or the same image) and not further back than the window.
static bool sees(const struct keel_image_tokens *im, uint32_t n, uint32_t window, uint32_t i, uint32_t j)
{
    const bool same = image_of(im, n, i) >= 0 && image_of(im, n, i) == image_of(im, n, j);
    return (j <= i || same) && (window == 0 || j + window > i);
}

// Tokens [from, to) of a row lie at `t0` of the batch, its position 0 at row `start` of keys.
static void check_row(const struct keel_batch *b, const struct keel_image_tokens *im, uint32_t n_images, uint32_t t0, uint32_t start,
                      uint32_t from, uint32_t to)
{
    for (uint32_t kind = 0; kind < 2; kind++) {
        const struct keel_token_span *s = (const struct keel_token_span *)keel_span_host(b->spans[kind]) + t0;
        const uint32_t w = kind == KEEL_LOCAL ? b->c->window : 0;
        for (uint32_t i = from; i < to; i++) {
            const struct keel_token_span *a = &s[i - from];
            assert_int_equal(a->slot, start + i);
            for (uint32_t j = 0; j < to; j++) {
                const bool in = start + j >= a->lo && start + j < a->hi;
                if (in != sees(im, n_images, w, i, j)) {
                    fail_msg("kind %u: token %u sees [%u, %u), token %u should%s be in it", kind, i, a->lo, a->hi, j, in ? " not" : "");
                }
                const struct keel_token_span *k = &s[j - from];
                if (j >= from && (start + i >= k->q_lo && start + i < k->q_hi) != sees(im, n_images, w, i, j)) {
                    fail_msg("kind %u: token %u is seen by [%u, %u), token %u is wrong", kind, j, k->q_lo, k->q_hi, i);
                }
            }
            assert_true(a->lo >= start && a->hi <= start + to);
        }
    }
}

static void test_spans(void **state)
{
    (void)state;
    uint8_t kinds[1] = { KEEL_GLOBAL };
    const struct keel_gemma3 c = { .n_layers = 1, .width = WIDTH, .head_dim = 8, .window = 5, .rope_base = { 1e4f, 1e6f },
                                   .rope_factor = { 1, 1 }, .kind = kinds };
    struct keel_batch b;
    keel_heap *heap = NULL;
    int32_t ids[64] = { 0 };
    float embeds[64 * WIDTH];
    uint32_t first;
    draw_embeds(embeds, 64, 1);
    // An image at the very start, one longer than the window, one of a single token, one that ends the row.
    const struct keel_image_tokens rows[][3] = { { { 0, 3, embeds }, { 5, 9, embeds }, { 20, 4, embeds } },
                                                 { { 2, 1, embeds }, { 4, 6, embeds + WIDTH }, { 11, 2, embeds } } };
    assert_int_equal(keel_batch_init(&b, &c, NULL), KEEL_OK);
    assert_int_equal(keel_layout_make(&heap, dev, KEEL_HEAP_HOST, "test", want_batch, &(struct batch_want){ &b, &c }), KEEL_OK);
    assert_int_equal(keel_batch_make_image_room(&b, dev), KEEL_OK);
    for (uint32_t k = 0; k < 2; k++) {
        const struct keel_batch_row row = { .ids = ids, .n = k ? 17 : 24, .images = rows[k], .n_images = 3 };
        assert_int_equal(keel_batch_add(&b, &row, &first), KEEL_OK);
        assert_int_equal(first, k ? 24 : 0);
        check_row(&b, rows[k], 3, first, first, 0, row.n);
    }
    keel_batch_ready(&b, dev);
    assert_int_equal(b.group[0].max_span[KEEL_LOCAL], 13); // the first token of the image of 9: 4 before it and all of it
    assert_int_equal(b.n_image_tokens, 16 + 9);
    const uint32_t *place = keel_span_host(b.image_place);
    assert_int_equal(place[3], 5);
    assert_int_equal(place[16], 24 + 2);
    assert_memory_equal((const float *)keel_span_host(b.image_rows) + 17 * WIDTH, embeds + WIDTH, WIDTH * sizeof(float));
    // The same row through a cache in parts of at most 10: no part cuts an image.
    for (uint32_t from = 0, to; from < 24; from = to) {
        to = keel_batch_cut(rows[0], 3, from, KEEL_MIN(from + 10, 24u));
        assert_int_equal(to, from == 0 ? 5 : from == 5 ? 15 : 24);
        keel_batch_clear(&b);
        const struct keel_batch_row row = { .ids = ids, .n = to - from, .images = rows[0], .n_images = 3, .from = from,
                                            .pos = from, .cached = true };
        assert_int_equal(keel_batch_add(&b, &row, &first), KEEL_OK);
        check_row(&b, rows[0], 3, 0, 0, from, to);
    }
    keel_heap_destroy(&heap);
    keel_batch_finish(&b);
}

static void test_bad_images(void **state)
{
    (void)state;
    struct memory_log log;
    const float e[1] = { 0 };
    const struct {
        struct keel_image_tokens im[2];
        uint32_t n_images, n, n_batch;
        const char *says;
    } cases[] = {
        { { { 3, 0, e } }, 1, 10, 10, "row 7: image 1 " },
        { { { 3, 2, NULL } }, 1, 10, 10, "row 7: image 1 " },
        { { { 3, 8, e } }, 1, 10, 10, "[3, 11) of 10" },
        { { { 3, 3, e }, { 5, 2, e } }, 2, 10, 10, "row 7: image 2 " },
        { { { 6, 3, e }, { 2, 2, e } }, 2, 10, 10, "sorted" },
        { { { 2, 6, e } }, 1, 10, 5, "--batch-tokens to at least 6" },
        { { { 11, UINT32_MAX, e } }, 1, 10, 10, "image 1" },
    };
    for (size_t i = 0; i < KEEL_COUNT(cases); i++) {
        memory_log_init(&log);
        assert_int_equal(keel_images_check(cases[i].im, cases[i].n_images, cases[i].n, cases[i].n_batch, "row 7", &log.log),
                         KEEL_ERR_ARG);
        assert_logged(&log, cases[i].says);
    }
    assert_int_equal(keel_images_check(cases[5].im, 1, 10, 6, "row", NULL), KEEL_OK);
    assert_int_equal(keel_images_check(cases[5].im, 1, 5 + 3, 8, "row", NULL), KEEL_OK);
}

// --- prefill, decode, score ----------------------------------------------------------------------

static float logprob(const float *logits, uint32_t vocab, int32_t id)
{
    double sum = 0;
    for (uint32_t v = 0; v < vocab; v++) {
        sum += exp((double)logits[v]);
    }
    return (float)((double)logits[id] - log(sum));
}

static void assert_close(const float *a, const float *b, uint32_t n, float tol, const char *what)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!(fabsf(a[i] - b[i]) <= tol)) {
            fail_msg("%s: place %u: %g against %g", what, i, (double)a[i], (double)b[i]);
        }
    }
}

static void test_prefill_decode_score(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    keel_model *m = loaded(&t);
    keel_session *s = NULL;
    int32_t ids[N_ROW];
    float embeds[2 * N_SOFT * WIDTH], want[N_ROW], got[N_ROW], kl[N_ROW];
    const struct keel_image_tokens im[2] = { { 1, N_SOFT, embeds }, { 24, N_SOFT, embeds + N_SOFT * WIDTH } };
    const uint32_t first = 43, n = N_ROW - first, batches[] = { 256, 59, 24, N_SOFT };
    draw_ids(ids, N_ROW, 3);
    draw_embeds(embeds, 2 * N_SOFT, 4);
    for (size_t k = 0; k < KEEL_COUNT(batches); k++) {
        struct keel_score_row row = { .ids = ids, .n = N_ROW, .first = first, .logprobs = k ? got : want, .images = im, .n_images = 2 };
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = batches[k] }), KEEL_OK);
        assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_OK);
        assert_close(got, want, k ? n : 0, 1e-4f, "score in parts");
        for (uint32_t pass = 0; pass < 2; pass++) {
            keel_session_reset(s);
            assert_int_equal(keel_session_append_images(s, ids, first, im, 2), KEEL_OK);
            for (uint32_t i = first; i < N_ROW; i++) {
                got[i - first] = logprob(keel_session_logits(s), t.vocab, ids[i]);
                assert_int_equal(keel_session_append(s, &ids[i], 1), KEEL_OK);
            }
            assert_close(got, want, n, 1e-4f, "decode after images");
        }
        // The second image in a later turn.
        keel_session_reset(s);
        const struct keel_image_tokens later = { 24 - 21, N_SOFT, im[1].embeds };
        assert_int_equal(keel_session_append_images(s, ids, 21, im, 1), KEEL_OK);
        assert_int_equal(keel_session_append_images(s, ids + 21, N_ROW - 1 - 21, &later, 1), KEEL_OK);
        assert_float_equal(logprob(keel_session_logits(s), t.vocab, ids[N_ROW - 1]), want[n - 1], 1e-4f);
        struct keel_kl_row kl_row = { .ids = ids, .n = N_ROW, .first = first, .kl = kl, .images = im, .n_images = 2 };
        assert_int_equal(keel_session_kl(s, &kl_row, 1, NULL, NULL), KEEL_OK);
        for (uint32_t i = 0; i < n; i++) {
            assert_true(fabsf(kl[i]) < 1e-5f); // no adapter
        }
        keel_session_destroy(&s);
    }
    // Text rows, the same row without its images, and images that are swapped: all packed into one batch.
    float plain[N_ROW], swapped[N_ROW], text[N_ROW], alone[N_ROW];
    const struct keel_image_tokens other[2] = { { 1, N_SOFT, im[1].embeds }, { 24, N_SOFT, im[0].embeds } };
    struct keel_score_row rows[] = {
        { .ids = ids, .n = 31, .first = 1, .logprobs = text },
        { .ids = ids, .n = N_ROW, .first = first, .logprobs = swapped, .images = other, .n_images = 2 },
        { .ids = ids, .n = N_ROW, .first = first, .logprobs = got, .images = im, .n_images = 2 },
        { .ids = ids, .n = N_ROW, .first = first, .logprobs = plain },
    };
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = 256 }), KEEL_OK);
    assert_int_equal(keel_session_score(s, rows, 4, NULL, NULL), KEEL_OK);
    assert_close(got, want, n, 1e-4f, "packed");
    assert_true(fabsf(swapped[n - 1] - want[n - 1]) > 1e-3f && fabsf(plain[n - 1] - want[n - 1]) > 1e-3f);
    struct keel_score_row one = { .ids = ids, .n = 31, .first = 1, .logprobs = alone };
    assert_int_equal(keel_session_score(s, &one, 1, NULL, NULL), KEEL_OK);
    assert_close(text, alone, 30, 1e-4f, "text beside images");
    keel_session_destroy(&s);
    keel_model_close(&m);
}

// Prompts with and without images continued together, several in a pass of which one holds only an image at a time.
static void test_generate(void **state)
{
    (void)state;
    enum { ROWS = 4, CAP = 6 };
    const struct tiny t = { TINY_DEFAULTS };
    const struct keel_sample_params greedy = { .repeat_penalty = 1.0f, .top_p = 1.0f };
    const uint32_t batches[] = { 256, 30, N_SOFT };
    keel_model *m = loaded(&t);
    int32_t ids[N_ROW], out[ROWS][CAP];
    float embeds[2 * N_SOFT * WIDTH];
    const struct keel_image_tokens im[2] = { { 1, N_SOFT, embeds }, { 24, N_SOFT, embeds + N_SOFT * WIDTH } };
    draw_ids(ids, N_ROW, 12);
    draw_embeds(embeds, 2 * N_SOFT, 13);
    for (size_t k = 0; k < KEEL_COUNT(batches); k++) {
        keel_session *s = NULL;
        struct keel_generate_row rows[ROWS] = {
            { .ids = ids, .n = 50, .images = im, .n_images = 2 }, { .ids = ids + 1, .n = 9 },
            { .ids = ids, .n = 21, .images = im, .n_images = 1 }, { .ids = ids, .n = 44, .images = im, .n_images = 2 },
        };
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = batches[k] }), KEEL_OK);
        for (uint32_t i = 0; i < ROWS; i++) {
            rows[i].out = out[i];
            rows[i].cap = CAP;
        }
        assert_int_equal(keel_session_generate(s, rows, ROWS, &greedy, 3, NULL, NULL), KEEL_OK);
        for (uint32_t i = 0; i < ROWS; i++) {
            int32_t id;
            keel_session_reset(s);
            assert_int_equal(keel_session_append_images(s, rows[i].ids, rows[i].n, rows[i].images, rows[i].n_images), KEEL_OK);
            for (uint32_t j = 0; j < rows[i].n_out; j++) {
                assert_int_equal(keel_session_sample(s, &greedy, &id), KEEL_OK);
                assert_int_equal(id, out[i][j]);
                assert_int_equal(keel_session_append(s, &id, 1), KEEL_OK);
            }
        }
        keel_session_destroy(&s);
    }
    keel_model_close(&m);
}

static void test_session_errors(void **state)
{
    (void)state;
    struct memory_log log;
    const struct tiny t = { TINY_DEFAULTS };
    keel_model *m = NULL;
    keel_session *s = NULL;
    int32_t ids[N_ROW];
    float embeds[N_SOFT * WIDTH] = { 0 }, lp[N_ROW];
    const struct keel_image_tokens im = { 5, N_SOFT, embeds };
    memory_log_init(&log);
    draw_ids(ids, N_ROW, 3);
    tiny_write(&t, path);
    assert_int_equal(keel_model_open(&m, path, &log.log), KEEL_OK);
    assert_int_equal(keel_model_load(m, dev), KEEL_OK);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 64, .n_batch = N_SOFT - 1 }), KEEL_OK);
    assert_int_equal(keel_session_append_images(s, ids, 40, &im, 1), KEEL_ERR_ARG);
    assert_logged(&log, "--batch-tokens to at least 19");
    assert_int_equal(keel_session_length(s), 0);
    struct keel_score_row row = { .ids = ids, .n = 40, .first = 30, .logprobs = lp, .images = &im, .n_images = 1 };
    assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_ERR_ARG);
    assert_logged(&log, "row 1: an image of 19 tokens");
    keel_session_destroy(&s);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 64, .n_batch = 64 }), KEEL_OK);
    row.first = 23; // the image ends at 24
    assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_ERR_ARG);
    assert_logged(&log, "row 1: scoring starts at token 23");
    row.first = 24;
    assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_OK);
    assert_int_equal(keel_session_append_images(s, ids, 20, &im, 1), KEEL_ERR_ARG);
    assert_logged(&log, "[5, 24) of 20");
    keel_session_destroy(&s);
    keel_model_close(&m);
}

// --- memory --------------------------------------------------------------------------------------

// The first row with images takes what the plan with images has more, and no other row takes it.
static void test_plan(void **state)
{
    (void)state;
    enum { WIDE = 512, BATCH = 1024 };
    const struct tiny t = { TINY_DEFAULTS .width = WIDE, .layers = 2, .context = 2048 };
    const struct keel_plan_params p = { .n_ctx = 2048, .n_batch = BATCH }, q = { .n_ctx = 2048, .n_batch = BATCH, .images = true };
    struct keel_plan text, image;
    uint64_t before, after, peak;
    keel_model *m = loaded(&t);
    keel_session *s = NULL;
    int32_t ids[N_ROW];
    float *embeds = calloc((size_t)N_SOFT * WIDE, sizeof *embeds);
    const struct keel_image_tokens im = { 5, N_SOFT, embeds };
    assert_non_null(embeds);
    draw_ids(ids, N_ROW, 3);
    assert_int_equal(keel_model_plan(m, &p, &text), KEEL_OK);
    assert_int_equal(keel_model_plan(m, &q, &image), KEEL_OK);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 2048, .n_batch = BATCH }), KEEL_OK);
    assert_int_equal(keel_session_append(s, ids, N_ROW), KEEL_OK);
    keel_device_memory(dev, &before, &peak);
    assert_int_equal(keel_session_append_images(s, ids, N_ROW, &im, 1), KEEL_OK);
    keel_device_memory(dev, &after, &peak);
    assert_int_equal(after - before, image.device_bytes - text.device_bytes);
    assert_int_equal(keel_session_append_images(s, ids, N_ROW, &im, 1), KEEL_OK);
    keel_device_memory(dev, &before, &peak);
    assert_int_equal(after, before);
    keel_session_destroy(&s);
    keel_model_close(&m);
    free(embeds);
}

// --- gradients -----------------------------------------------------------------------------------

enum { N_SEQS = 3, RANK = 3 };

struct train_case {
    keel_model *m;
    keel_trainer *t;
    keel_adapter *a;
    struct keel_span grads;
    struct keel_seq seqs[N_SEQS];
    float *zero;
};

static double weighted_loss(struct train_case *c)
{
    double nll;
    uint64_t n;
    assert_int_equal(keel_upload(dev, c->grads, c->zero, c->a->n_floats * 4), KEEL_OK);
    assert_int_equal(keel_trainer_step(c->t, c->a, c->grads, c->seqs, N_SEQS, &nll, &n), KEEL_OK);
    return nll * (double)c->seqs[0].weight;
}

static double length(const float *g, uint64_t n)
{
    double sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        sum += (double)g[i] * (double)g[i];
    }
    return sqrt(sum);
}

// Moves `x` [n] along `g` by the step in both directions; the slope of the loss must be the length of g.
static void check_slope(struct train_case *c, float *x, const float *g, uint64_t n, bool params, const char *what)
{
    const double norm = length(g, n), step = 2e-2;
    double loss[2];
    float *old = malloc(n * sizeof *old);
    assert_non_null(old);
    memcpy(old, x, n * sizeof *old);
    if (!(norm > 1e-4)) {
        fail_msg("%s: the gradient is %g", what, norm);
    }
    for (uint32_t k = 0; k < 2; k++) {
        for (uint64_t j = 0; j < n; j++) {
            x[j] = old[j] + (float)((k ? 1.0 : -1.0) * step * (double)g[j] / norm);
        }
        if (params) {
            assert_int_equal(keel_upload(dev, c->a->params, x, n * 4), KEEL_OK);
        }
        loss[k] = weighted_loss(c);
    }
    const double diff = (loss[1] - loss[0]) / (2 * step);
    if (fabs(diff - norm) > 0.02 * norm + 2e-3) {
        fail_msg("%s: central difference %g, gradient %g", what, diff, norm);
    }
    memcpy(x, old, n * sizeof *old);
    if (params) {
        assert_int_equal(keel_upload(dev, c->a->params, x, n * 4), KEEL_OK);
    }
    free(old);
}

// Adapters on a few projections of layers above the lowest, so that a step without input gradients stops early.
static float *random_params(struct train_case *c)
{
    struct keel_rng rng = keel_rng_make(9, 9);
    float *host = calloc(c->a->n_floats, sizeof *host);
    assert_non_null(host);
    for (size_t i = 0; i < (size_t)c->a->n_layers * KEEL_N_PROJ; i++) {
        const struct keel_span side[2] = { c->a->pair[i].a, c->a->pair[i].b };
        for (uint32_t k = 0; k < 2 && c->a->pair[i].rank > 0; k++) {
            float *p = host + (side[k].offset - c->a->params.offset) / 4;
            for (uint64_t j = 0; j < (uint64_t)RANK * (k ? c->a->pair[i].n : c->a->pair[i].k); j++) {
                p[j] = 0.1f * (float)keel_rng_normal(&rng);
            }
        }
    }
    assert_int_equal(keel_upload(dev, c->a->params, host, c->a->n_floats * 4), KEEL_OK);
    return host;
}

static void test_gradients(void **state)
{
    (void)state;
    const struct tiny t = { TINY_DEFAULTS };
    struct train_case c = { .m = loaded(&t) };
    int32_t ids[N_SEQS][N_ROW];
    float embeds[3 * N_SOFT * WIDTH], input[2 * N_ROW * WIDTH + 20 * WIDTH];
    const struct keel_image_tokens two[2] = { { 3, N_SOFT, embeds }, { 24, N_SOFT, embeds + N_SOFT * WIDTH } };
    const struct keel_image_tokens head = { 0, N_SOFT, embeds + 2 * N_SOFT * WIDTH };
    const uint32_t total = 58 + 20 + 40;
    keel_heap *heap = NULL;
    draw_embeds(embeds, 3 * N_SOFT, 8);
    assert_int_equal(keel_adapter_create(&c.a, c.m, RANK, 6.0f, 127, NULL, 5), KEEL_OK);
    float *params = random_params(&c);
    float *g = malloc(c.a->n_floats * 4), *again = malloc(c.a->n_floats * 4);
    c.zero = calloc(c.a->n_floats, 4);
    assert_true(g && again && c.zero);
    assert_int_equal(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "gradients"), KEEL_OK);
    assert_int_equal(keel_heap_alloc(heap, c.a->n_floats * 4, &c.grads), KEEL_OK);
    assert_int_equal(keel_trainer_create(&c.t, c.m, total, 58, total), KEEL_OK);
    for (uint32_t i = 0; i < N_SEQS; i++) {
        draw_ids(ids[i], N_ROW, 50 + i);
    }
    // Two images, a text row, an image before everything.
    c.seqs[0] = (struct keel_seq){ .ids = ids[0], .n = 58, .first = 45, .weight = 0.25f, .images = two, .n_images = 2 };
    c.seqs[1] = (struct keel_seq){ .ids = ids[1], .n = 20, .first = 4, .weight = 0.25f };
    c.seqs[2] = (struct keel_seq){ .ids = ids[2], .n = 40, .first = 22, .weight = 0.25f, .images = &head, .n_images = 1 };
    weighted_loss(&c);
    assert_int_equal(keel_download(dev, g, c.grads, c.a->n_floats * 4), KEEL_OK);
    check_slope(&c, params, g, c.a->n_floats, true, "adapter");
    keel_trainer_want_input_grads(c.t, true);
    weighted_loss(&c);
    assert_int_equal(keel_download(dev, again, c.grads, c.a->n_floats * 4), KEEL_OK);
    assert_memory_equal(again, g, c.a->n_floats * 4); // the adapter's gradient does not change
    const struct keel_span d = keel_trainer_input_grads(c.t);
    assert_int_equal(d.bytes, 4ull * total * WIDTH);
    assert_int_equal(keel_download(dev, input, d, d.bytes), KEEL_OK);
    check_slope(&c, embeds, input + 3 * WIDTH, N_SOFT * WIDTH, false, "first image");
    check_slope(&c, embeds + N_SOFT * WIDTH, input + 24 * WIDTH, N_SOFT * WIDTH, false, "second image");
    check_slope(&c, embeds + 2 * N_SOFT * WIDTH, input + (58 + 20) * WIDTH, N_SOFT * WIDTH, false, "image of another row");
    keel_trainer_destroy(&c.t);
    keel_heap_destroy(&heap);
    keel_adapter_destroy(&c.a);
    keel_model_close(&c.m);
    free(params);
    free(g);
    free(again);
    free(c.zero);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spans),         cmocka_unit_test(test_bad_images), cmocka_unit_test(test_prefill_decode_score),
        cmocka_unit_test(test_generate),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_session_errors), cmocka_unit_test(test_gradients),
    };
    return cmocka_run_group_tests(tests, tiny_open_device, tiny_close_device);
}
