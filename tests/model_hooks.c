// SPDX-License-Identifier: MIT
// tests/model_hooks.c: hooks on a small model: prefill against decode against score, positions, gradients against central
// differences, no dispatch without hooks, errors. tests/e2e/test_steer.py compares the same code with PyTorch.
#include "formats_util.h"
#include "model_tiny.h"

#include "gemma3/gemma3.h"

static const char path[] = "model_hooks.gguf";
static const struct tiny shape = { TINY_DEFAULTS };

static keel_model *loaded(const keel_log *log)
{
    keel_model *m = NULL;
    tiny_write(&shape, path);
    assert_int_equal(keel_model_open(&m, path, log), KEEL_OK);
    assert_int_equal(keel_model_load(m, dev), KEEL_OK);
    return m;
}

static void draw_ids(int32_t *ids, uint32_t n, uint64_t seed)
{
    struct keel_rng rng = keel_rng_make(seed, 2);
    ids[0] = 2;
    for (uint32_t i = 1; i < n; i++) {
        ids[i] = (int32_t)(6 + keel_rng_below(&rng, shape.vocab - 6));
    }
}

static float *draw_direction(float *v, uint32_t k, uint64_t seed)
{
    struct keel_rng rng = keel_rng_make(seed, 3);
    for (uint32_t i = 0; i < k * shape.width; i++) {
        v[i] = (float)keel_rng_normal(&rng);
    }
    return v;
}

static void add(keel_hooks *h, enum keel_site site, uint32_t layer, enum keel_hook_op op, const char *at, float amount, uint32_t k)
{
    float v[3 * 64];
    struct keel_hook_params p = { .site = site, .layer = layer, .op = op, .amount = amount, .k = k };
    assert_int_equal(keel_positions_parse(at, &p.at, NULL), KEEL_OK);
    p.v = draw_direction(v, k, 100 * site + layer);
    assert_int_equal(keel_hooks_add(h, &p), KEEL_OK);
}

// An amount that changes with a token's place in the response.
static void add_fading(keel_hooks *h, enum keel_hook_schedule_kind kind)
{
    float v[64];
    const struct keel_hook_params p = { .layer = 4, .amount = 3, .k = 1, .v = draw_direction(v, 1, kind), .tokens = { kind, 4 } };
    assert_int_equal(keel_hooks_add(h, &p), KEEL_OK);
}

// Every operation at every site, for sets that mean the same however a text is cut into passes.
static void add_mixture(keel_hooks *h, bool by_role)
{
    add(h, KEEL_SITE_PRE, 0, KEEL_HOOK_ADD, "all", 0.3f, 1);
    add(h, KEEL_SITE_PRE, 3, KEEL_HOOK_ABLATE, by_role ? "prompt" : "all", 0, 3);
    add(h, KEEL_SITE_POST, 3, KEEL_HOOK_CAP, "all", 0.1f, 1);
    add(h, KEEL_SITE_ATTN, 1, KEEL_HOOK_FLOOR, "all", 0.2f, 1);
    add(h, KEEL_SITE_ATTN, 2, KEEL_HOOK_ABLATE, by_role ? "response" : "all", 0, 2);
    add(h, KEEL_SITE_ATTN, 2, KEEL_HOOK_ADD, by_role ? "last_prompt" : "all", 0.5f, 1);
    add(h, KEEL_SITE_MLP, 2, KEEL_HOOK_CAP, by_role ? "first:5" : "all", -0.1f, 1);
    add(h, KEEL_SITE_MLP, 6, KEEL_HOOK_ADD, "all", -0.7f, 1);
    add(h, KEEL_SITE_POST, 6, KEEL_HOOK_ABLATE, "all", 0, 1);
}

static float logprob(const float *z, uint32_t n, int32_t id)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += exp((double)z[i] - (double)z[id]);
    }
    return (float)-log(sum);
}

enum { N_IDS = 90, CUT = 50 };

static void test_paths_agree(void **state)
{
    (void)state;
    keel_model *m = loaded(NULL);
    keel_hooks *h = NULL;
    int32_t ids[N_IDS];
    float plain[N_IDS - CUT], want[N_IDS - CUT], got[N_IDS - CUT];
    const uint32_t batches[] = { 128, 13 };
    draw_ids(ids, N_IDS, 3);
    assert_int_equal(keel_hooks_create(&h, m), KEEL_OK);
    add_mixture(h, true);
    for (size_t k = 0; k < KEEL_COUNT(batches); k++) {
        keel_session *s = NULL;
        struct keel_score_row row = { .ids = ids, .n = N_IDS, .first = CUT, .logprobs = plain };
        assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128, .n_batch = batches[k] }), KEEL_OK);
        assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_OK);
        assert_int_equal(keel_session_set_hooks(s, h), KEEL_OK);
        row.logprobs = k == 0 ? want : got;
        assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_OK);
        float moved = 0;
        for (uint32_t i = 0; i < N_IDS - CUT; i++) {
            moved += fabsf(row.logprobs[i] - plain[i]);
            assert_true(fabsf(row.logprobs[i] - want[i]) < 1e-4f); // in parts as in one
        }
        assert_true(moved > 1.0f);
        for (uint32_t pass = 0; pass < 2; pass++) { // token by token: recorded, then replayed
            keel_session_reset(s);
            assert_int_equal(keel_session_append(s, ids, CUT), KEEL_OK);
            for (uint32_t i = CUT; i < N_IDS; i++) {
                const float lp = logprob(keel_session_logits(s), shape.vocab, ids[i]);
                if (fabsf(lp - want[i - CUT]) >= 1e-4f) {
                    fail_msg("batches of %u, pass %u, token %u: %g by decode, %g by score", batches[k], pass, i, (double)lp,
                             (double)want[i - CUT]);
                }
                assert_int_equal(keel_session_append(s, &ids[i], 1), KEEL_OK);
            }
        }
        assert_int_equal(keel_session_set_hooks(s, NULL), KEEL_OK);
        row.logprobs = got;
        assert_int_equal(keel_session_score(s, &row, 1, NULL, NULL), KEEL_OK);
        assert_memory_equal(got, plain, sizeof plain); // nothing stays behind
        keel_session_destroy(&s);
    }
    keel_hooks_destroy(&h);
    keel_model_close(&m);
}

// Several sequences together as one alone, and only tokens that the model wrote when hooks say so.
static void test_generate(void **state)
{
    (void)state;
    enum { ROWS = 3, CAP = 12 };
    static const char *const sets[] = { "response", "decode", "last_prompt", "prompt", "all" };
    keel_model *m = loaded(NULL);
    keel_session *s = NULL;
    const struct keel_sample_params greedy = { .top_k = 0, .top_p = 1.0f, .repeat_penalty = 1.0f };
    int32_t ids[20], out[ROWS][CAP];
    draw_ids(ids, 20, 5);
    assert_int_equal(keel_session_create(&s, m, &(struct keel_session_params){ .n_ctx = 128 }), KEEL_OK);
    for (size_t k = 0; k < KEEL_COUNT(sets); k++) {
        struct keel_generate_row rows[ROWS];
        keel_hooks *h = NULL;
        assert_int_equal(keel_hooks_create(&h, m), KEEL_OK);
        add(h, KEEL_SITE_POST, 2, KEEL_HOOK_ADD, sets[k], 2.0f, 1);
        add_fading(h, KEEL_HOOK_DECAY);
        add_fading(h, KEEL_HOOK_RAMP);
        assert_int_equal(keel_session_set_hooks(s, h), KEEL_OK);
        for (uint32_t i = 0; i < ROWS; i++) {
            rows[i] = (struct keel_generate_row){ .ids = ids, .n = 5 + 4 * i, .out = out[i], .cap = CAP };
        }
        assert_int_equal(keel_session_generate(s, rows, ROWS, &greedy, 0, NULL, NULL), KEEL_OK);
        for (uint32_t i = 0; i < ROWS; i++) {
            keel_session_reset(s);
            assert_int_equal(keel_session_append(s, ids, rows[i].n), KEEL_OK);
            for (uint32_t j = 0; j < rows[i].n_out; j++) {
                int32_t id;
                assert_int_equal(keel_session_sample(s, &greedy, &id), KEEL_OK);
                assert_int_equal(id, out[i][j]);
                assert_int_equal(keel_session_append(s, &id, 1), KEEL_OK);
            }
        }
        assert_int_equal(keel_session_set_hooks(s, NULL), KEEL_OK);
        keel_hooks_destroy(&h);
    }
    keel_session_destroy(&s);
    keel_model_close(&m);
}

static uint64_t dispatches(keel_session *s, struct keel_score_row *row)
{
    uint64_t before, after, unused;
    keel_device_counts(dev, &before, &unused, &unused);
    assert_int_equal(keel_session_score(s, row, 1, NULL, NULL), KEEL_OK);
    keel_device_counts(dev, &after, &unused, &unused);
    return after - before;
}

static void test_no_cost(void **state)
{
    (void)state;
    keel_model *m = loaded(NULL);
    keel_session *s = NULL;
    keel_hooks *none = NULL, *one = NULL;
    int32_t ids[20];
    float lp[20];
    struct keel_score_row row = { .ids = ids, .n = 20, .first = 10, .logprobs = lp };
    draw_ids(ids, 20, 1);
    assert_int_equal(keel_session_create(&s, m, NULL), KEEL_OK);
    assert_int_equal(keel_hooks_create(&none, m), KEEL_OK);
    assert_int_equal(keel_hooks_create(&one, m), KEEL_OK);
    add(one, KEEL_SITE_POST, 1, KEEL_HOOK_ADD, "all", 1, 1);
    const uint64_t without = dispatches(s, &row);
    assert_int_equal(keel_session_set_hooks(s, none), KEEL_OK);
    assert_int_equal(dispatches(s, &row), without);
    assert_int_equal(keel_session_set_hooks(s, one), KEEL_OK);
    assert_int_equal(dispatches(s, &row), without + 2); // its own, and the norms on both sides of it no longer share one
    keel_session_destroy(&s);
    keel_hooks_destroy(&none);
    keel_hooks_destroy(&one);
    keel_model_close(&m);
}

// --- gradients -----------------------------------------------------------------------------------

enum { RANK = 2, N_SEQS = 2 };

struct train_case {
    keel_trainer *t;
    keel_adapter *a;
    struct keel_span grads;
    struct keel_seq seqs[N_SEQS];
    float *zero;
};

static double loss(struct train_case *c, const float *params, float *g)
{
    double nll;
    uint64_t n;
    assert_int_equal(keel_upload(dev, c->a->params, params, c->a->n_floats * 4), KEEL_OK);
    assert_int_equal(keel_upload(dev, c->grads, c->zero, c->a->n_floats * 4), KEEL_OK);
    assert_int_equal(keel_trainer_step(c->t, c->a, c->grads, c->seqs, N_SEQS, &nll, &n), KEEL_OK);
    if (g) {
        assert_int_equal(keel_download(dev, g, c->grads, c->a->n_floats * 4), KEEL_OK);
    }
    return nll;
}

static void test_gradients(void **state)
{
    (void)state;
    keel_model *m = loaded(NULL);
    struct train_case c = { 0 };
    keel_heap *heap = NULL;
    keel_hooks *h = NULL;
    int32_t ids[N_SEQS][24];
    struct keel_rng rng = keel_rng_make(4, 4);
    assert_int_equal(keel_adapter_create(&c.a, m, RANK, 4.0f, 127, NULL, 5), KEEL_OK);
    const size_t n = c.a->n_floats;
    float *params = calloc(n, 4), *g = malloc(n * 4), *moved = malloc(n * 4);
    c.zero = calloc(n, 4);
    assert_true(params && g && moved && c.zero);
    for (size_t i = 0; i < (size_t)c.a->n_layers * KEEL_N_PROJ; i++) {
        const struct keel_span side[2] = { c.a->pair[i].a, c.a->pair[i].b };
        for (uint32_t k = 0; k < 2; k++) {
            for (uint64_t j = 0; j < side[k].bytes / 4; j++) {
                params[(side[k].offset - c.a->params.offset) / 4 + j] = 0.1f * (float)keel_rng_normal(&rng);
            }
        }
    }
    assert_int_equal(keel_heap_create(&heap, dev, KEEL_HEAP_DEVICE, "gradients"), KEEL_OK);
    assert_int_equal(keel_heap_alloc(heap, n * 4, &c.grads), KEEL_OK);
    assert_int_equal(keel_trainer_create(&c.t, m, 48, 24, 48), KEEL_OK);
    for (uint32_t i = 0; i < N_SEQS; i++) {
        draw_ids(ids[i], 24, 50 + i);
        c.seqs[i] = (struct keel_seq){ .ids = ids[i], .n = 24 - 5 * i, .first = 9, .weight = 1 };
    }
    const double plain = loss(&c, params, NULL);
    assert_int_equal(keel_hooks_create(&h, m), KEEL_OK);
    add_mixture(h, true);
    assert_int_equal(keel_trainer_set_hooks(c.t, h), KEEL_OK);
    assert_true(fabs(loss(&c, params, g) - plain) > 0.1);
    // Along the gradient of one pair the loss rises by its norm: layers below, between and above the hooks.
    for (uint32_t layer = 0; layer < shape.layers; layer += 2) {
        for (uint32_t p = 0; p < KEEL_N_PROJ; p += 3) {
            const struct keel_span b = c.a->pair[layer * KEEL_N_PROJ + p].b;
            const uint64_t at = (b.offset - c.a->params.offset) / 4, len = b.bytes / 4;
            double norm = 0, side[2];
            for (uint64_t j = 0; j < len; j++) {
                norm += (double)g[at + j] * (double)g[at + j];
            }
            norm = sqrt(norm);
            for (uint32_t k = 0; k < 2; k++) {
                memcpy(moved, params, n * 4);
                for (uint64_t j = 0; j < len; j++) {
                    moved[at + j] += (float)((k ? 2e-2 : -2e-2) * (double)g[at + j] / norm);
                }
                side[k] = loss(&c, moved, NULL);
            }
            const double slope = (side[1] - side[0]) / 4e-2;
            if (!(fabs(slope - norm) <= 0.02 * norm + 3e-3)) {
                fail_msg("layer %u %s: central difference %g, gradient %g", layer, keel_proj_name[p], slope, norm);
            }
        }
    }
    assert_int_equal(keel_trainer_set_hooks(c.t, NULL), KEEL_OK);
    assert_true(loss(&c, params, NULL) == plain);
    keel_trainer_destroy(&c.t);
    keel_heap_destroy(&heap);
    keel_adapter_destroy(&c.a);
    keel_hooks_destroy(&h);
    keel_model_close(&m);
    free(params);
    free(g);
    free(moved);
    free(c.zero);
}

// --- errors --------------------------------------------------------------------------------------

static void test_errors(void **state)
{
    (void)state;
    struct memory_log log;
    memory_log_init(&log);
    keel_model *m = loaded(&log.log);
    keel_hooks *h = NULL;
    float v[3 * 64], zero[64] = { 0 }, nan[64], twice[2 * 64];
    draw_direction(v, 3, 1);
    memcpy(nan, v, sizeof nan);
    nan[7] = NAN;
    for (uint32_t i = 0; i < 2 * 64; i++) {
        twice[i] = v[i % 64] * (i < 64 ? 1.0f : -2.0f);
    }
    assert_int_equal(keel_hooks_create(&h, m), KEEL_OK);
    const struct {
        struct keel_hook_params p;
        const char *says;
    } bad[] = {
        { { .layer = 7, .v = v, .k = 1 }, "layers 0 to 6" },
        { { .v = nan, .k = 1, .op = KEEL_HOOK_CAP }, "element 7" },
        { { .v = zero, .k = 1, .op = KEEL_HOOK_ABLATE }, "length 0" },
        { { .v = twice, .k = 2, .op = KEEL_HOOK_ABLATE }, "direction 1" },
        { { .v = v, .k = 2, .op = KEEL_HOOK_ADD }, "only ablation" },
        { { .v = v, .k = 1, .amount = INFINITY }, "amount" },
    };
    for (size_t i = 0; i < KEEL_COUNT(bad); i++) {
        log.n = 0;
        assert_int_equal(keel_hooks_add(h, &bad[i].p), KEEL_ERR_ARG);
        assert_logged(&log, bad[i].says);
    }
    const struct keel_hook_params cap = { .layer = 2, .op = KEEL_HOOK_CAP, .v = v, .k = 1, .amount = 1 },
                                  floor = { .layer = 2, .op = KEEL_HOOK_FLOOR, .v = v, .k = 1, .amount = 2 };
    assert_int_equal(keel_hooks_add(h, &cap), KEEL_OK);
    log.n = 0;
    assert_int_equal(keel_hooks_add(h, &floor), KEEL_ERR_ARG);
    assert_logged(&log, "contradict");
    assert_int_equal(keel_hooks_count(h), 1);
    float opposite[64];
    for (uint32_t i = 0; i < 64; i++) {
        opposite[i] = -v[i];
    }
    const enum keel_position_kind sets[][2] = { { KEEL_AT_PROMPT, KEEL_AT_RESPONSE }, { KEEL_AT_DECODE, KEEL_AT_LAST_PROMPT }, { KEEL_AT_FIRST, KEEL_AT_RESPONSE } };
    for (uint32_t i = 0; i < KEEL_COUNT(sets); i++) { // on other tokens limits do not meet; the last two sets do
        struct keel_hook_params low = cap, high = floor;
        low.layer = high.layer = 3 + i;
        low.at = (struct keel_positions){ .kind = sets[i][0], .k = sets[i][0] == KEEL_AT_FIRST ? 2 : 0 };
        high.at.kind = sets[i][1];
        assert_int_equal(keel_hooks_add(h, &low), KEEL_OK);
        assert_int_equal(keel_hooks_add(h, &high), i < 2 ? KEEL_OK : KEEL_ERR_ARG);
    }
    const struct { // along -v in layer 2, where v has a cap of 1
        enum keel_hook_op op;
        float amount;
        keel_status want;
    } against[] = { { KEEL_HOOK_CAP, -2, KEEL_ERR_ARG }, { KEEL_HOOK_FLOOR, -3, KEEL_OK }, { KEEL_HOOK_CAP, 0, KEEL_OK } };
    for (uint32_t i = 0; i < KEEL_COUNT(against); i++) {
        log.n = 0;
        assert_int_equal(keel_hooks_add(h, &(struct keel_hook_params){ .layer = 2, .op = against[i].op, .v = opposite, .k = 1, .amount = against[i].amount }),
                         against[i].want);
        if (against[i].want != KEEL_OK) {
            assert_logged(&log, "opposite direction contradict");
        }
    }

    struct keel_positions at;
    uint8_t use[7];
    static const char *const bad_at[] = { "", "al", "first", "first:0", "first:x", "first:3x" };
    for (size_t i = 0; i < KEEL_COUNT(bad_at); i++) {
        assert_int_equal(keel_positions_parse(bad_at[i], &at, &log.log), KEEL_ERR_ARG);
    }
    static const char *const bad_layers[] = { "", "7", "3-", "5-3", "1,,2", "1,", "a", "-1", "0-7" };
    for (size_t i = 0; i < KEEL_COUNT(bad_layers); i++) {
        assert_int_equal(keel_layers_parse(bad_layers[i], use, 7, &log.log), KEEL_ERR_ARG);
    }
    assert_int_equal(keel_layers_parse("0,2-4,6", use, 7, NULL), KEEL_OK);
    assert_memory_equal(use, ((const uint8_t[]){ 1, 0, 1, 1, 1, 0, 1 }), 7);
    keel_hooks_destroy(&h);
    keel_model_close(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_paths_agree), cmocka_unit_test(test_generate), cmocka_unit_test(test_no_cost),
        cmocka_unit_test(test_gradients),   cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, tiny_open_device, tiny_close_device);
}
