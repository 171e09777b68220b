// SPDX-License-Identifier: MIT
// formats/quantize.c: f32 to GGML's block types. The plain types are bit-equal to gguf-py's quantiser; the K
// types try several roundings a sub-block, solve for scale and minimum by least squares and keep the best.
// Layouts as in quant.c. The weighting of K-quants (larger values count more) is that of ggml-quants.c
// without imatrix.
#include "formats.h"

#include <math.h>
#include <string.h>

static void put16(uint8_t *p, uint16_t v)
{
    memcpy(p, &v, sizeof v);
}

static float put_f16(uint8_t *p, float f) // returns the value as stored
{
    const uint16_t h = keel_f32_to_f16(f);
    put16(p, h);
    return keel_f16_to_f32(h);
}

// The integer part, limited to [0, max]; NaN gives 0.
static int floor_to(float x, int max)
{
    return !(x > 0) ? 0 : x >= (float)max ? max : (int)x;
}

// Nearest integer limited to [min, max]; NaN gives min.
static int nearest(float x, int min, int max)
{
    return !(x > (float)min) ? min : x >= (float)max ? max : (int)lrintf(x);
}

static float inverse(float d)
{
    return d != 0 ? 1.0f / d : 0.0f;
}

static void range(const float *x, int n, float *min, float *max)
{
    *min = *max = x[0];
    for (int i = 1; i < n; i++) {
        *min = x[i] < *min ? x[i] : *min;
        *max = x[i] > *max ? x[i] : *max;
    }
}

// The value with the largest magnitude, with its sign; the first one among equals.
static float largest(const float *x, int n)
{
    float best = 0;
    for (int i = 0; i < n; i++) {
        best = fabsf(x[i]) > fabsf(best) ? x[i] : best;
    }
    return best;
}

// --- 32-element blocks ---------------------------------------------------------------------------

static void put_nibbles(uint8_t *qs, const int *q)
{
    for (int i = 0; i < 16; i++) {
        qs[i] = (uint8_t)((q[i] & 15) | (q[i + 16] & 15) << 4);
    }
}

static void put_fifth_bits(uint8_t *qh, const int *q)
{
    memset(qh, 0, 4);
    for (int i = 0; i < 32; i++) {
        qh[i / 8] |= (uint8_t)((q[i] >> 4 & 1) << i % 8);
    }
}

// Symmetric: the largest value becomes -levels / 2, which has one step more than the positive side.
static void to_symmetric(const float *x, uint8_t *b, int *q, int levels)
{
    const float d = largest(x, 32) / (float)(-levels / 2), id = inverse(d);
    put_f16(b, d);
    for (int i = 0; i < 32; i++) {
        const float p = x[i] * id;
        q[i] = floor_to(p + ((float)(levels / 2) + 0.5f), levels - 1);
    }
}

static void to_affine(const float *x, uint8_t *b, int *q, int levels)
{
    float min, max;
    range(x, 32, &min, &max);
    const float d = (max - min) / (float)(levels - 1), id = inverse(d);
    put_f16(b, d);
    put_f16(b + 2, min);
    for (int i = 0; i < 32; i++) {
        const float p = (x[i] - min) * id;
        q[i] = floor_to(p + 0.5f, levels - 1);
    }
}

static void to_q4_0(const float *x, uint8_t *b)
{
    int q[32];
    to_symmetric(x, b, q, 16);
    put_nibbles(b + 2, q);
}

static void to_q4_1(const float *x, uint8_t *b)
{
    int q[32];
    to_affine(x, b, q, 16);
    put_nibbles(b + 4, q);
}

static void to_q5_0(const float *x, uint8_t *b)
{
    int q[32];
    to_symmetric(x, b, q, 32);
    put_fifth_bits(b + 2, q);
    put_nibbles(b + 6, q);
}

static void to_q5_1(const float *x, uint8_t *b)
{
    int q[32];
    to_affine(x, b, q, 32);
    put_fifth_bits(b + 4, q);
    put_nibbles(b + 8, q);
}

static void to_q8_0(const float *x, uint8_t *b)
{
    const float d = fabsf(largest(x, 32)) / 127.0f, id = inverse(d);
    put_f16(b, d);
    for (int i = 0; i < 32; i++) {
        const float p = roundf(x[i] * id); // halves away from zero
        b[2 + i] = (uint8_t)(int8_t)nearest(p, -127, 127);
    }
}

// --- 256-element blocks --------------------------------------------------------------------------

// Finds scale >= 0 and minus >= 0 so that x[i] is about scale * q[i] - minus with q in [0, top], n = 32.
static void fit_affine(const float *x, int top, float *scale, float *minus)
{
    float w[32], min, max;
    double power = 0;
    for (int i = 0; i < 32; i++) {
        power += (double)x[i] * (double)x[i];
    }
    const float rms = (float)sqrt(power / 32);
    for (int i = 0; i < 32; i++) {
        w[i] = rms + fabsf(x[i]);
    }
    range(x, 32, &min, &max);
    min = min < 0 ? min : 0;
    *scale = 0;
    *minus = -min;
    if (!(max - min > 0)) {
        return;
    }
    double best = INFINITY;
    for (int step = -10; step <= 10; step++) {
        const float is = ((float)top + 0.1f * (float)step) / (max - min);
        double sw = 0, sx = 0, sq = 0, sqq = 0, sxq = 0, sxx = 0;
        for (int i = 0; i < 32; i++) {
            const double q = nearest((x[i] - min) * is, 0, top), wi = (double)w[i], xi = (double)x[i];
            sw += wi;
            sx += wi * xi;
            sq += wi * q;
            sqq += wi * q * q;
            sxq += wi * xi * q;
            sxx += wi * xi * xi;
        }
        // Least squares for x = s q + c; c above zero cannot be stored.
        const double det = sw * sqq - sq * sq;
        double s = det > 0 ? (sw * sxq - sq * sx) / det : 0, c = det > 0 ? (sqq * sx - sq * sxq) / det : 0;
        if (c > 0 || det <= 0) {
            c = 0;
            s = sqq > 0 ? sxq / sqq : 0;
        }
        const double err = sxx - 2 * s * sxq - 2 * c * sx + s * s * sqq + 2 * s * c * sq + c * c * sw;
        if (err < best && s >= 0) {
            best = err;
            *scale = (float)s;
            *minus = (float)-c;
        }
    }
}

static void put_scale_min(uint8_t *s, const int *scale, const int *min) // inverse of quant.c's get_scale_min
{
    for (int j = 0; j < 4; j++) {
        s[j] = (uint8_t)(scale[j] | scale[j + 4] >> 4 << 6);
        s[j + 4] = (uint8_t)(min[j] | min[j + 4] >> 4 << 6);
        s[j + 8] = (uint8_t)((scale[j + 4] & 15) | (min[j + 4] & 15) << 4);
    }
}

// Writes d, dmin and scales (16 bytes) and the 256 quants of a Q4_K (top 15) or Q5_K (top 31) block.
static void to_q45_k(const float *x, uint8_t *b, int *q, int top)
{
    float scale[8], minus[8], max_scale, max_minus, unused;
    int qscale[8], qminus[8];
    for (int j = 0; j < 8; j++) {
        fit_affine(x + 32 * j, top, &scale[j], &minus[j]);
    }
    range(scale, 8, &unused, &max_scale);
    range(minus, 8, &unused, &max_minus);
    const float d = put_f16(b, max_scale / 63.0f), dmin = put_f16(b + 2, max_minus / 63.0f);
    const float id = inverse(d), idmin = inverse(dmin);
    for (int j = 0; j < 8; j++) {
        qscale[j] = nearest(scale[j] * id, 0, 63);
        qminus[j] = nearest(minus[j] * idmin, 0, 63);
        const float is = inverse(d * (float)qscale[j]), m = dmin * (float)qminus[j];
        for (int i = 0; i < 32; i++) {
            q[32 * j + i] = nearest((x[32 * j + i] + m) * is, 0, top);
        }
    }
    put_scale_min(b + 4, qscale, qminus);
}

static void put_k_nibbles(uint8_t *qs, const int *q)
{
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < 32; i++) {
            qs[32 * k + i] = (uint8_t)((q[64 * k + i] & 15) | (q[64 * k + 32 + i] & 15) << 4);
        }
    }
}

static void to_q4_k(const float *x, uint8_t *b)
{
    int q[256];
    to_q45_k(x, b, q, 15);
    put_k_nibbles(b + 16, q);
}

static void to_q5_k(const float *x, uint8_t *b)
{
    int q[256];
    to_q45_k(x, b, q, 31);
    memset(b + 16, 0, 32);
    for (int e = 0; e < 256; e++) {
        b[16 + e % 32] |= (uint8_t)((q[e] >> 4 & 1) << e / 32);
    }
    put_k_nibbles(b + 48, q);
}

// The scale s, of either sign, for which x is about s * q with q in [-32, 31], n = 16; weights are x².
static float fit_symmetric(const float *x)
{
    const float most = largest(x, 16);
    float best_scale = 0;
    double best = -1;
    if (most == 0) {
        return 0;
    }
    for (int step = -9; step <= 9; step++) {
        const float is = -(32.0f + 0.1f * (float)step) / most;
        double sxq = 0, sqq = 0;
        for (int i = 0; i < 16; i++) {
            const double q = nearest(x[i] * is, -32, 31), w = (double)x[i] * (double)x[i];
            sxq += w * (double)x[i] * q;
            sqq += w * q * q;
        }
        if (sqq > 0 && sxq * sxq / sqq > best) { // the squared error that this scale removes
            best = sxq * sxq / sqq;
            best_scale = (float)(sxq / sqq);
        }
    }
    return best_scale;
}

static void to_q6_k(const float *x, uint8_t *b)
{
    float scale[16];
    memset(b, 0, 192);
    for (int j = 0; j < 16; j++) {
        scale[j] = fit_symmetric(x + 16 * j);
    }
    const float d = put_f16(b + 208, largest(scale, 16) / -128.0f), id = inverse(d);
    for (int j = 0; j < 16; j++) {
        const int qs = nearest(scale[j] * id, -128, 127);
        const float is = inverse(d * (float)qs);
        b[192 + j] = (uint8_t)(int8_t)qs;
        for (int i = 0; i < 16; i++) {
            const int e = 16 * j + i, half = e / 128, quarter = e % 128 / 32;
            const int q = nearest(x[e] * is, -32, 31) + 32;
            b[half * 64 + quarter % 2 * 32 + e % 32] |= (uint8_t)((q & 15) << (quarter < 2 ? 0 : 4));
            b[128 + half * 32 + e % 32] |= (uint8_t)(q >> 4 << (2 * quarter));
        }
    }
}

static void to_blocks(const struct keel_dtype_info *info, void (*one)(const float *, uint8_t *),
                      const float *src, uint8_t *dst, size_t n)
{
    for (size_t i = 0; i < n / info->block_elems; i++) {
        one(src + i * info->block_elems, dst + i * info->block_bytes);
    }
}

void keel_quantize(enum keel_dtype type, const float *src, void *dst, size_t n)
{
    const struct keel_dtype_info *info = keel_dtype_info((uint32_t)type);
    uint8_t *b = dst;
    KEEL_ASSERT(info && n % info->block_elems == 0);
    switch (type) {
    case KEEL_F32:
        if (n > 0) {
            memcpy(dst, src, n * sizeof *src);
        }
        return;
    case KEEL_F16:
        for (size_t i = 0; i < n; i++) {
            put16(b + 2 * i, keel_f32_to_f16(src[i]));
        }
        return;
    case KEEL_BF16:
        for (size_t i = 0; i < n; i++) {
            put16(b + 2 * i, keel_f32_to_bf16(src[i]));
        }
        return;
    case KEEL_Q4_0:
        to_blocks(info, to_q4_0, src, b, n);
        return;
    case KEEL_Q4_1:
        to_blocks(info, to_q4_1, src, b, n);
        return;
    case KEEL_Q5_0:
        to_blocks(info, to_q5_0, src, b, n);
        return;
    case KEEL_Q5_1:
        to_blocks(info, to_q5_1, src, b, n);
        return;
    case KEEL_Q8_0:
        to_blocks(info, to_q8_0, src, b, n);
        return;
    case KEEL_Q4_K:
        to_blocks(info, to_q4_k, src, b, n);
        return;
    case KEEL_Q5_K:
        to_blocks(info, to_q5_k, src, b, n);
        return;
    case KEEL_Q6_K:
        to_blocks(info, to_q6_k, src, b, n);
        return;
    }
}
