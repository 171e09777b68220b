// SPDX-License-Identifier: MIT
// tests/formats_quant.c: block types against vectors that gguf-py computed (tests/data/quant_vectors.py), bit
// by bit, and bounds on the error of a quantised signal.
#include "formats_util.h"

#include "data/quant_vectors.h"

#include <math.h>

#define N 4096u // elements, a multiple of every block; as in quant_vectors.py

static uint64_t hash_floats(const float *x, size_t n)
{
    uint64_t h = KEEL_HASH_INIT;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &x[i], sizeof u);
        u = isnan(x[i]) ? 0x7fc00000u : u; // payloads of NaN are not compared
        h = keel_hash(h, &u, sizeof u);
    }
    return h;
}

static void test_dequantize(void **state)
{
    float *y = malloc(N * sizeof *y);
    (void)state;
    for (size_t i = 0; i < KEEL_COUNT(quant_vectors); i++) {
        const struct quant_vector *v = &quant_vectors[i];
        const size_t bytes = (size_t)keel_dtype_bytes(v->type, N);
        uint8_t *buf = malloc(bytes + 1), *b = buf + 1; // one off: no alignment may be assumed
        uint32_t seed = v->seed;
        for (size_t k = 0; k < bytes; k++) {
            b[k] = next_byte(&seed);
        }
        keel_dequantize(v->type, b, y, N);
        if (hash_floats(y, N) != v->dequantized) {
            fail_msg("%s: random bytes (seed %u) dequantise differently from gguf-py",
                     keel_dtype_info(v->type)->name, v->seed);
        }
        free(buf);
    }
    free(y);
}

// Values of several magnitudes, and some blocks of zeros and of equal values.
static void make_signal(float *x)
{
    uint32_t seed = 99;
    for (uint32_t i = 0; i < N; i++) {
        int32_t v = 0;
        for (int k = 0; k < 4; k++) { // a sum of four bytes is nearly normal
            v += next_byte(&seed);
        }
        const uint32_t block = i / 256;
        x[i] = block == 3 ? 0.0f : block == 4 ? 0.75f : (float)(v - 510) * (block % 2 ? 0x1p-10f : 0x1p-16f);
    }
}

static void test_quantize(void **state)
{
    float *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y);
    uint8_t *b = malloc(N * sizeof(float));
    (void)state;
    make_signal(x);
    for (size_t i = 0; i < KEEL_COUNT(quant_vectors); i++) {
        const struct quant_vector *v = &quant_vectors[i];
        double err = 0, power = 0;
        keel_quantize(v->type, x, b, N);
        if (v->quantized &&
            keel_hash(KEEL_HASH_INIT, b, (size_t)keel_dtype_bytes(v->type, N)) != v->quantized) {
            fail_msg("%s: quantises differently from gguf-py", keel_dtype_info(v->type)->name);
        }
        keel_dequantize(v->type, b, y, N);
        for (uint32_t k = 0; k < N; k++) {
            err += ((double)y[k] - (double)x[k]) * ((double)y[k] - (double)x[k]);
            power += (double)x[k] * (double)x[k];
        }
        if (!(sqrt(err / power) <= v->rmse)) {
            fail_msg("%s: relative rms error %.5f, at most %.5f expected", keel_dtype_info(v->type)->name,
                     sqrt(err / power), v->rmse);
        }
    }
    free(x);
    free(y);
    free(b);
}

// Not finite input must not be undefined behaviour; the sanitizer build is what checks this.
static void test_not_finite(void **state)
{
    static const float bad[] = { INFINITY, -INFINITY, NAN, 3.4e38f, -3.4e38f, 1e-45f };
    float x[256], y[256];
    uint8_t b[1024];
    (void)state;
    for (size_t t = 0; t < KEEL_COUNT(quant_vectors); t++) {
        for (size_t i = 0; i < KEEL_COUNT(bad); i++) {
            for (size_t k = 0; k < 256; k++) {
                x[k] = k % 7 == i ? bad[i] : 1.0f;
            }
            keel_quantize(quant_vectors[t].type, x, b, 256);
            keel_dequantize(quant_vectors[t].type, b, y, 256);
        }
    }
    keel_dequantize(KEEL_Q8_0, NULL, y, 0);
    assert_true(keel_dtype_bytes(KEEL_Q6_K, 512) == 420);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dequantize),
        cmocka_unit_test(test_quantize),
        cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
