// SPDX-License-Identifier: MIT
// tests/ref/ref_test.c: tests of the reference itself: every backward against central differences in double, the
// optimiser and GELU against numbers from PyTorch, the dequantiser against blocks worked out by hand.
#include "ref.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define MAX_ARRAYS 16

// One function under test: its arrays, drawn at random, and the loss Σ c · output it is differentiated through.
struct grad_case {
    struct keel_rng rng;
    double *array[MAX_ARRAYS];
    int n_arrays;
    int T, N, K, H, G, d; // what they mean is up to the case
    const int *lo, *hi;
};

static double *draw(struct grad_case *c, size_t n)
{
    double *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = keel_rng_normal(&c->rng);
    }
    c->array[c->n_arrays++] = x;
    return x;
}

static void finish(struct grad_case *c)
{
    for (int i = 0; i < c->n_arrays; i++) {
        free(c->array[i]);
    }
    c->n_arrays = 0;
}

// The step is near the cube root of the double epsilon, where truncation (h²) and cancellation (eps / h) balance at about
// 1e-10; values here are of order 1 to 100, so 1e-7 of the gradient's scale leaves a factor of ten.
static void check_gradient(const char *what, double (*loss)(const struct grad_case *), const struct grad_case *c, double *x,
                           const double *dx, size_t n)
{
    const double h = 6e-6;
    double scale = 1;
    for (size_t i = 0; i < n; i++) {
        scale = fmax(scale, fabs(dx[i]));
    }
    for (size_t i = 0; i < n; i++) {
        const double keep = x[i];
        x[i] = keep + h;
        const double up = loss(c);
        x[i] = keep - h;
        const double down = loss(c);
        x[i] = keep;
        const double slope = (up - down) / (2 * h);
        if (!(fabs(slope - dx[i]) <= 1e-7 * scale)) {
            fail_msg("%s[%zu]: backward %.12g, central difference %.12g", what, i, dx[i], slope);
        }
    }
}

static double dot(const double *a, const double *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

// --- linear: array 0 x, 1 w, 2 c -----------------------------------------------------------------

static double linear_loss(const struct grad_case *c)
{
    double *y = malloc((size_t)c->T * c->N * sizeof *y);
    ref_linear(y, c->array[0], c->array[1], c->T, c->N, c->K, false);
    const double sum = dot(y, c->array[2], (size_t)c->T * c->N);
    free(y);
    return sum;
}

static void test_linear(void **state)
{
    (void)state;
    struct grad_case c = { .rng = keel_rng_make(1, 1), .T = 3, .N = 5, .K = 7 };
    double *x = draw(&c, 21), *w = draw(&c, 35), *dy = draw(&c, 15), *dx = draw(&c, 21);
    ref_linear_bwd(dx, dy, w, 3, 5, 7, false);
    check_gradient("linear dx", linear_loss, &c, x, dx, 21);
    double before[21];
    memcpy(before, dx, sizeof before);
    ref_linear_bwd(dx, dy, w, 3, 5, 7, true);
    for (int i = 0; i < 21; i++) {
        assert_true(fabs(dx[i] - 2 * before[i]) < 1e-12);
    }
    finish(&c);
}

// --- LoRA: array 0 x, 1 a, 2 b, 3 c; y = 0.75 · (x aᵀ) bᵀ, r in H --------------------------------

static double lora_loss(const struct grad_case *c)
{
    double *h = malloc((size_t)c->T * c->H * sizeof *h);
    double *y = calloc((size_t)c->T * c->N, sizeof *y);
    ref_lora_down(h, c->array[0], c->array[1], c->T, c->K, c->H);
    ref_lora_up(y, h, c->array[2], c->T, c->N, c->H, 0.75);
    const double sum = dot(y, c->array[3], (size_t)c->T * c->N);
    free(h);
    free(y);
    return sum;
}

static void test_lora(void **state)
{
    (void)state;
    struct grad_case c = { .rng = keel_rng_make(1, 2), .T = 4, .N = 6, .K = 5, .H = 3 };
    double *x = draw(&c, 20), *a = draw(&c, 15), *b = draw(&c, 18), *dy = draw(&c, 24);
    double h[12], dh[12], dx[20] = { 0 }, da[15] = { 0 }, db[18] = { 0 };
    ref_lora_down(h, x, a, 4, 5, 3);
    ref_lora_bwd_h(dh, dy, b, 4, 6, 3, 0.75);
    ref_lora_bwd_x(dx, dh, a, 4, 5, 3);
    ref_lora_bwd_a(da, dh, x, 4, 5, 3);
    ref_lora_bwd_b(db, dy, h, 4, 6, 3, 0.75);
    check_gradient("lora dx", lora_loss, &c, x, dx, 20);
    check_gradient("lora da", lora_loss, &c, a, da, 15);
    check_gradient("lora db", lora_loss, &c, b, db, 18);
    finish(&c);
}

// --- norm: array 0 x, 1 w, 2 residual, 3 c -------------------------------------------------------

static double rmsnorm_loss(const struct grad_case *c)
{
    double *y = malloc((size_t)c->T * c->K * sizeof *y);
    ref_rmsnorm(y, c->array[0], c->array[1], c->array[2], c->T, c->K, 1e-3);
    const double sum = dot(y, c->array[3], (size_t)c->T * c->K);
    free(y);
    return sum;
}

static void test_rmsnorm(void **state)
{
    (void)state;
    struct grad_case c = { .rng = keel_rng_make(1, 3), .T = 3, .K = 7 };
    double *x = draw(&c, 21), *w = draw(&c, 7);
    draw(&c, 21);
    double *dy = draw(&c, 21), dx[21];
    ref_rmsnorm_bwd(dx, x, w, dy, 3, 7, 1e-3, false);
    check_gradient("rmsnorm dx", rmsnorm_loss, &c, x, dx, 21);
    finish(&c);
}

// --- heads: array 0 x, 1 w, 2 rope, 3 c ----------------------------------------------------------

static double heads_loss(const struct grad_case *c)
{
    const size_t n = (size_t)c->T * c->H * c->d;
    double *y = malloc(n * sizeof *y);
    ref_heads(y, c->array[0], c->array[1], c->array[2], NULL, c->T, c->H, c->d, 1e-3);
    const double sum = dot(y, c->array[3], n);
    free(y);
    return sum;
}

static void test_heads(void **state)
{
    (void)state;
    struct grad_case c = { .rng = keel_rng_make(1, 4), .T = 3, .H = 2, .d = 8 };
    double *x = draw(&c, 48), *w = draw(&c, 8), *rope = draw(&c, 24), *dy = draw(&c, 48), dx[48];
    for (int i = 0; i < 12; i++) {
        const double angle = rope[i * 2];
        rope[i * 2] = cos(angle);
        rope[i * 2 + 1] = sin(angle);
    }
    ref_heads_bwd(dx, x, w, rope, dy, 3, 2, 8, 1e-3);
    check_gradient("heads dx", heads_loss, &c, x, dx, 48);
    // a rotation keeps the length of each head, so the norm of y is that of the normed x
    double y[48], z[48];
    ref_heads(y, x, w, rope, NULL, 3, 2, 8, 1e-3);
    ref_rmsnorm(z, x, w, NULL, 6, 8, 1e-3);
    for (int h = 0; h < 6; h++) {
        assert_true(fabs(ref_sumsq(y + h * 8, 8) - ref_sumsq(z + h * 8, 8)) < 1e-12);
    }
    const int slot[3] = { 2, 0, 1 };
    ref_heads(y, x, NULL, NULL, slot, 3, 2, 8, 0);
    assert_memory_equal(y + 32, x, 16 * sizeof *x);
    assert_memory_equal(y, x + 16, 32 * sizeof *x);
    finish(&c);
}

// --- attention: array 0 q, 1 k, 2 v, 3 c; R in N, S in K -----------------------------------------

static double attention_loss(const struct grad_case *c)
{
    const size_t n = (size_t)c->T * c->H * c->d;
    double *o = malloc(n * sizeof *o), *p = malloc((size_t)c->H * c->T * c->K * sizeof *p);
    ref_attention(o, p, c->array[0], c->array[1], c->array[2], (struct ref_mask){ c->lo, c->hi }, c->T, c->H, c->G, c->d,
                  c->N, c->K, 0.3);
    const double sum = dot(o, c->array[3], n);
    free(o);
    free(p);
    return sum;
}

static void check_attention(const char *mask_name, const int *lo, const int *hi, int R)
{
    enum { T = 7, H = 4, G = 2, d = 4 };
    struct grad_case c = { .rng = keel_rng_make(1, 5), .T = T, .N = R, .H = H, .G = G, .d = d, .lo = lo, .hi = hi };
    for (int t = 0; t < T; t++) {
        c.K = KEEL_MAX(c.K, hi[t] - lo[t]);
    }
    const size_t n = T * H * d, m = (size_t)R * G * d;
    double *q = draw(&c, n), *k = draw(&c, m), *v = draw(&c, m), *d_o = draw(&c, n);
    double *o = draw(&c, n), *p = draw(&c, (size_t)H * T * c.K);
    double *dq = draw(&c, n), *dk = draw(&c, m), *dv = draw(&c, m);
    const struct ref_mask mask = { lo, hi };
    ref_attention(o, p, q, k, v, mask, T, H, G, d, R, c.K, 0.3);
    ref_attention_bwd(dq, dk, dv, d_o, p, q, k, v, mask, T, H, G, d, R, c.K, 0.3);
    print_message("attention, %s\n", mask_name);
    check_gradient("attention dq", attention_loss, &c, q, dq, n);
    check_gradient("attention dk", attention_loss, &c, k, dk, m);
    check_gradient("attention dv", attention_loss, &c, v, dv, m);
    finish(&c);
}

static void test_attention(void **state)
{
    (void)state;
    check_attention("causal", (int[]){ 0, 0, 0, 0, 0, 0, 0 }, (int[]){ 1, 2, 3, 4, 5, 6, 7 }, 7);
    check_attention("window 3", (int[]){ 0, 0, 0, 1, 2, 3, 4 }, (int[]){ 1, 2, 3, 4, 5, 6, 7 }, 7);
    check_attention("packed rows", (int[]){ 0, 0, 0, 3, 3, 5, 5 }, (int[]){ 1, 2, 3, 4, 5, 6, 7 }, 7);
    check_attention("image block", (int[]){ 0, 0, 0, 0, 0, 0, 0 }, (int[]){ 1, 5, 5, 5, 5, 6, 7 }, 7);
    check_attention("ring of 9", (int[]){ 3, 4, 5, 6, 7, 8, 9 }, (int[]){ 6, 7, 8, 9, 10, 11, 12 }, 9);
}

// --- geglu: array 0 gate, 1 up, 2 c --------------------------------------------------------------

static double geglu_loss(const struct grad_case *c)
{
    double y[16];
    ref_geglu(y, c->array[0], c->array[1], 16);
    return dot(y, c->array[2], 16);
}

static void test_geglu(void **state)
{
    (void)state;
    struct grad_case c = { .rng = keel_rng_make(1, 6) };
    double *gate = draw(&c, 16), *up = draw(&c, 16), *dy = draw(&c, 16), d_gate[16], d_up[16];
    ref_geglu_bwd(d_gate, d_up, gate, up, dy, 16);
    check_gradient("geglu d_gate", geglu_loss, &c, gate, d_gate, 16);
    check_gradient("geglu d_up", geglu_loss, &c, up, d_up, 16);
    finish(&c);
    // torch.nn.functional.gelu(x, approximate='tanh') in float64, PyTorch 2
    const double x[5] = { -3, -1.5, 0, 1.5, 3 }, one[5] = { 1, 1, 1, 1, 1 };
    const double want[5] = { -0.0036373920817729943, -0.10042842301976707, 0, 1.3995715769802328, 2.9963626079182268 };
    double y[5];
    ref_geglu(y, x, one, 5);
    for (int i = 0; i < 5; i++) {
        assert_true(fabs(y[i] - want[i]) < 1e-14);
    }
}

// --- vision: array 0 x, 1 w, 2 b, 3 c ------------------------------------------------------------

static double layernorm_loss(const struct grad_case *c)
{
    double y[15];
    ref_layernorm(y, c->array[0], c->array[1], c->array[2], 3, 5, 1e-6);
    return dot(y, c->array[3], 15);
}

static double gelu_loss(const struct grad_case *c)
{
    double y[15];
    ref_gelu(y, c->array[0], 15);
    return dot(y, c->array[3], 15);
}

static void test_layernorm_gelu(void **state)
{
    (void)state;
    struct grad_case c = { .rng = keel_rng_make(1, 11) };
    double *x = draw(&c, 15), *w = draw(&c, 5);
    draw(&c, 5); // b, which no gradient depends on
    double *dy = draw(&c, 15), dx[15], twice[15];
    ref_layernorm_bwd(dx, x, w, dy, 3, 5, 1e-6, false);
    check_gradient("layernorm dx", layernorm_loss, &c, x, dx, 15);
    memcpy(twice, dx, sizeof dx);
    ref_layernorm_bwd(twice, x, w, dy, 3, 5, 1e-6, true);
    for (int i = 0; i < 15; i++) {
        assert_true(fabs(twice[i] - 2 * dx[i]) < 1e-12);
    }
    ref_gelu_bwd(dx, x, dy, 15);
    check_gradient("gelu dx", gelu_loss, &c, x, dx, 15);
    finish(&c);
}

static void test_pool_bias(void **state)
{
    (void)state;
    // grid 5, kernel 2: the last row and column are in no square
    double x[25], y[4], dx[25];
    const double dy[4] = { 1, 2, 3, 4 }, b[5] = { 1, 0, 0, 0, 2 };
    for (int i = 0; i < 25; i++) {
        x[i] = i;
    }
    ref_pool(y, x, 5, 2, 1);
    assert_true(y[0] == 3 && y[1] == 5 && y[2] == 13 && y[3] == 15);
    ref_pool_bwd(dx, dy, 5, 2, 1);
    assert_true(fabs(dot(dx, x, 25) - dot(dy, y, 4)) < 1e-12); // linear, so <dx, x> = <dy, y>
    assert_true(dx[4] == 0 && dx[24] == 0 && dx[18] == 1);
    ref_bias(x, x, b, x, 5, 5);
    assert_true(x[0] == 1 && x[1] == 2 && x[9] == 20 && x[24] == 50);
}

// --- vocabulary rows: array 0 logits, 1 weights; KL: array 0 p, 1 q ------------------------------

static const uint32_t xent_targets[3] = { 4, 0, 10 };

static double xent_loss(const struct grad_case *c)
{
    double stats[12], sum = 0;
    ref_xent(stats, c->array[0], xent_targets, 3, 11);
    for (int i = 0; i < 3; i++) {
        sum += c->array[1][i] * (stats[i * 4 + 1] - stats[i * 4 + 2]);
    }
    return sum;
}

static void test_xent(void **state)
{
    (void)state;
    struct grad_case c = { .rng = keel_rng_make(1, 7) };
    double *x = draw(&c, 33), *w = draw(&c, 3), dx[33], stats[12], kl[6];
    ref_xent_bwd(dx, x, xent_targets, w, 3, 11);
    check_gradient("xent d_logits", xent_loss, &c, x, dx, 33);
    const double flat[4] = { 3, 3, 3, 3 }, two[4] = { log(0.5), log(0.25), log(0.125), log(0.125) };
    ref_xent(stats, flat, (uint32_t[]){ 2 }, 1, 4);
    assert_true(stats[0] == 3 && fabs(stats[1] - 3 - log(4)) < 1e-15 && stats[2] == 3 && fabs(stats[3] - log(4)) < 1e-15);
    ref_xent(stats, two, (uint32_t[]){ 1 }, 1, 4); // entropy of (1/2, 1/4, 1/8, 1/8) is 7/4 bits
    assert_true(fabs(stats[1]) < 1e-15 && fabs(stats[3] - 1.75 * log(2)) < 1e-14);
    ref_kl(kl, flat, two, 1, 4); // 1/4 Σ (log 1/4 - log q) = log 2 / 4; Σ q (log q - log 1/4) = log 2 / 4
    assert_true(fabs(kl[0] - log(2) / 4) < 1e-14 && fabs(kl[1] - log(2) / 4) < 1e-14);
    finish(&c);
}

// --- optimiser -----------------------------------------------------------------------------------

// Three steps of torch.optim.AdamW([0.5, -1.25, 2.0], lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1) in float64
// after clip_grad_norm_(1.0), PyTorch 2.
static void test_adamw(void **state)
{
    (void)state;
    const double grad[3][3] = { { 3, -4, 0.5 }, { 0.1, 0.2, -0.3 }, { 1e-3, -2, 7 } };
    const double want[3][3] = { { 0.48950001674976795, -1.2387500125623312, 1.9880001004977663 },
                                { 0.48113638289194793, -1.2328070224538215, 1.9909479859173318 },
                                { 0.4745375077240655, -1.2260720651122694, 1.9841248567375793 } };
    double w[3] = { 0.5, -1.25, 2 }, m[3] = { 0 }, v[3] = { 0 };
    for (int s = 0; s < 3; s++) {
        const struct ref_adamw_params p = { .lr = 0.01,           .beta1 = 0.9, .beta2 = 0.98,
                                            .eps = 1e-6,          .clip = 1,    .norm = sqrt(ref_sumsq(grad[s], 3)),
                                            .weight_decay = 0.1,  .step = s + 1 };
        ref_adamw(w, m, v, grad[s], 3, &p);
        for (int i = 0; i < 3; i++) {
            assert_true(fabs(w[i] - want[s][i]) < 1e-14);
        }
    }
    assert_true(fabs(m[0] - 0.057372533874823488) < 1e-15 && fabs(v[2] - 0.020444738751237351) < 1e-15);
}

// --- dequantisation ------------------------------------------------------------------------------

// Small blocks worked out by hand from the layout; scale 0x3800 is 0.5, 0x3c00 is 1.
static void test_dequant(void **state)
{
    (void)state;
    double w[256];
    const uint8_t q4_0[18] = { 0x00, 0x38, 0xf1 };
    ref_dequant(w, NULL, KEEL_Q4_0, q4_0, 32);
    assert_true(w[0] == -3.5 && w[1] == -4 && w[16] == 3.5);
    const uint8_t q5_1[24] = { 0x00, 0x38, 0x00, 0x3c, 0x01, 0x00, 0x00, 0x80, [8] = 0x21, [23] = 0x70 };
    ref_dequant(w, NULL, KEEL_Q5_1, q5_1, 32);
    assert_true(w[0] == 0.5 * 17 + 1 && w[16] == 0.5 * 2 + 1 && w[31] == 0.5 * (16 + 7) + 1);
    const uint8_t q8_0[34] = { 0x00, 0x38, 0x80, 0x7f };
    ref_dequant(w, NULL, KEEL_Q8_0, q8_0, 32);
    assert_true(w[0] == -64 && w[1] == 63.5 && w[2] == 0);
    // sub-block 0: scale 3, min 2; sub-block 4: scale 1 | 2 << 4, min 5 | 1 << 4
    const uint8_t q4_k[144] = { 0x00, 0x38, 0x00, 0x3c, [4] = 3 | 2 << 6, [8] = 2 | 1 << 6, [12] = 1 | 5 << 4,
                                [16] = 0x0c, [16 + 64] = 0x07 };
    ref_dequant(w, NULL, KEEL_Q4_K, q4_k, 256);
    assert_true(w[0] == 0.5 * 3 * 12 - 2 && w[1] == -2 && w[128] == 0.5 * 33 * 7 - 21);
    // element 96 + 5 of half 1: high nibble of ql[64 + 32 + 5], bits 6-7 of qh[32 + 5], scale (128 + 96) / 16
    const uint8_t q6_k[210] = { [64 + 37] = 0xa0, [128 + 37] = 0xc0, [192 + 14] = 0xfe, [209] = 0x38 };
    ref_dequant(w, NULL, KEEL_Q6_K, q6_k, 256);
    assert_true(w[128 + 96 + 5] == 0.5 * -2 * ((10 | 3 << 4) - 32) && w[0] == 0 && w[128 + 96] == 0.5 * -2 * -32);
}

static void test_random_blocks(void **state)
{
    (void)state;
    const enum keel_dtype types[] = { KEEL_F32,  KEEL_F16,  KEEL_BF16, KEEL_Q4_0, KEEL_Q4_1, KEEL_Q5_0,
                                      KEEL_Q5_1, KEEL_Q8_0, KEEL_Q4_K, KEEL_Q5_K, KEEL_Q6_K };
    struct keel_rng rng = keel_rng_make(1, 8);
    const size_t n = 8192;
    uint8_t *blocks = malloc(n * 4);
    double *w = malloc(n * sizeof *w), *mag = malloc(n * sizeof *mag);
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        ref_random_blocks(&rng, types[i], blocks, n);
        ref_dequant(w, mag, types[i], blocks, n);
        for (size_t j = 0; j < n; j++) {
            assert_true(fabs(w[j]) <= mag[j] && mag[j] < 100);
        }
        const double rms = sqrt(ref_sumsq(w, n) / (double)n);
        if (rms < 0.2 || rms > 3) {
            fail_msg("%s: values of order 1 expected, rms is %g", keel_dtype_info(types[i])->name, rms);
        }
    }
    free(blocks);
    free(w);
    free(mag);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear),  cmocka_unit_test(test_lora),      cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_heads),   cmocka_unit_test(test_attention), cmocka_unit_test(test_geglu),
        cmocka_unit_test(test_layernorm_gelu), cmocka_unit_test(test_pool_bias),
        cmocka_unit_test(test_xent),    cmocka_unit_test(test_adamw),     cmocka_unit_test(test_dequant),
        cmocka_unit_test(test_random_blocks),
    };
    return cmocka_run_group_tests_name("ref", tests, NULL, NULL);
}
