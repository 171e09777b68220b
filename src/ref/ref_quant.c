// SPDX-License-Identifier: MIT
// src/ref/ref_quant.c: dequantisation element by element from the byte offsets of GGML's blocks: the second opinion beside
// keel_dequantize(). For element i of a block it answers: which scale, which minimum, which quant.
// Source: llama.cpp ggml/src/ggml-common.h (block layouts) and ggml-quants.c (dequantize_row_*).
#include "ref.h"

#include <math.h>
#include <string.h>

// An element is scale · (quant - offset) - min.
struct element {
    double scale, quant, offset, min;
};

static uint16_t u16_at(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t u32_at(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

// Half precision by its definition rather than by bit tricks, so as not to share keel_f16_to_f32().
static double half_at(const uint8_t *p)
{
    const uint16_t h = u16_at(p);
    const int exp = h >> 10 & 31, man = h & 1023;
    const double mag = exp == 0 ? ldexp(man, -24) : ldexp(1024 + man, exp - 25);
    return h >> 15 ? -mag : mag;
}

// Element i of a 32-element block with a 4-bit quant at `qs`: low nibbles are elements 0..15, high nibbles 16..31.
static int nibble32(const uint8_t *qs, int i)
{
    return i < 16 ? qs[i] & 15 : qs[i - 16] >> 4;
}

// The 6-bit scale and minimum of sub-block s (0..7) of a Q4_K or Q5_K block, packed in 12 bytes.
static void scale_min_6bit(const uint8_t *packed, int s, int *scale, int *min)
{
    if (s < 4) {
        *scale = packed[s] & 63;
        *min = packed[s + 4] & 63;
    } else {
        *scale = (packed[s + 4] & 15) | packed[s - 4] >> 6 << 4;
        *min = packed[s + 4] >> 4 | packed[s] >> 6 << 4;
    }
}

static struct element k_element(enum keel_dtype type, const uint8_t *b, int i)
{
    struct element e = { 0 };
    if (type == KEEL_Q6_K) { // ql[128] qh[64] scales[16] d: two halves of 128 elements, each four groups of 32
        const int half = i / 128, group = i % 128 / 32, l = i % 32;
        const uint8_t ql = b[half * 64 + group % 2 * 32 + l];
        const uint8_t qh = b[128 + half * 32 + l];
        e.scale = half_at(b + 208) * (int8_t)b[192 + i / 16];
        e.quant = (group < 2 ? ql & 15 : ql >> 4) | (qh >> 2 * group & 3) << 4;
        e.offset = 32;
        return e;
    }
    // d dmin scales[12] (qh[32] in Q5_K) qs[128]: each 32 bytes of qs hold two sub-blocks, low nibbles first
    const int s = i / 32, l = i % 32;
    int scale, min;
    scale_min_6bit(b + 4, s, &scale, &min);
    const uint8_t qs = b[(type == KEEL_Q5_K ? 48 : 16) + s / 2 * 32 + l];
    e.scale = half_at(b) * scale;
    e.min = half_at(b + 2) * min;
    e.quant = s % 2 ? qs >> 4 : qs & 15;
    if (type == KEEL_Q5_K) {
        e.quant += (b[16 + l] >> s & 1) * 16;
    }
    return e;
}

static struct element element_of(enum keel_dtype type, const uint8_t *b, int i)
{
    struct element e = { .scale = 1 };
    switch (type) {
    case KEEL_F32: {
        float f;
        memcpy(&f, b, sizeof f);
        e.quant = f;
        break;
    }
    case KEEL_F16:
        e.quant = half_at(b);
        break;
    case KEEL_BF16: {
        const uint32_t u = (uint32_t)u16_at(b) << 16;
        float f;
        memcpy(&f, &u, sizeof f);
        e.quant = f;
        break;
    }
    case KEEL_Q4_0: // d qs[16]
        e = (struct element){ half_at(b), nibble32(b + 2, i), 8, 0 };
        break;
    case KEEL_Q4_1: // d m qs[16]
        e = (struct element){ half_at(b), nibble32(b + 4, i), 0, -half_at(b + 2) };
        break;
    case KEEL_Q5_0: // d qh qs[16]
        e = (struct element){ half_at(b), nibble32(b + 6, i) + 16 * (int)(u32_at(b + 2) >> i & 1), 16, 0 };
        break;
    case KEEL_Q5_1: // d m qh qs[16]
        e = (struct element){ half_at(b), nibble32(b + 8, i) + 16 * (int)(u32_at(b + 4) >> i & 1), 0, -half_at(b + 2) };
        break;
    case KEEL_Q8_0: // d qs[32]
        e = (struct element){ half_at(b), (int8_t)b[2 + i], 0, 0 };
        break;
    case KEEL_Q4_K:
    case KEEL_Q5_K:
    case KEEL_Q6_K:
        e = k_element(type, b, i);
        break;
    }
    return e;
}

void ref_dequant(double *w, double *mag, enum keel_dtype type, const void *blocks, size_t n)
{
    const struct keel_dtype_info *info = keel_dtype_info(type);
    for (size_t i = 0; i < n; i++) {
        const uint8_t *block = (const uint8_t *)blocks + i / info->block_elems * info->block_bytes;
        const struct element e = element_of(type, block, (int)(i % info->block_elems));
        w[i] = e.scale * (e.quant - e.offset) - e.min;
        if (mag) {
            mag[i] = fabs(e.scale) * (fabs(e.quant) + e.offset) + fabs(e.min);
        }
    }
}

// --- random blocks -------------------------------------------------------------------------------

static void put_u16(uint8_t *p, uint16_t x)
{
    p[0] = (uint8_t)x;
    p[1] = (uint8_t)(x >> 8);
}

// A scale around `unit` of either sign; one in 16 is zero or subnormal, as real files have them.
static void put_scale(struct keel_rng *rng, uint8_t *p, double unit)
{
    const uint32_t kind = keel_rng_below(rng, 32);
    uint16_t h = keel_f32_to_f16((float)(unit * (0.5 + keel_rng_uniform(rng)) * (kind & 1 ? 1 : -1)));
    if (kind == 30) {
        h = 0;
    } else if (kind == 31) {
        h = (uint16_t)(1 + keel_rng_below(rng, 1023));
    }
    put_u16(p, h);
}

static void put_float(struct keel_rng *rng, enum keel_dtype type, uint8_t *p)
{
    const float f = keel_rng_below(rng, 32) == 0 ? 0.0f : (float)keel_rng_normal(rng);
    if (type == KEEL_F32) {
        memcpy(p, &f, sizeof f);
    } else if (type == KEEL_BF16) {
        put_u16(p, keel_f32_to_bf16(f));
    } else {
        put_u16(p, keel_rng_below(rng, 32) == 0 ? (uint16_t)keel_rng_below(rng, 1024) : keel_f32_to_f16(f));
    }
}

void ref_random_blocks(struct keel_rng *rng, enum keel_dtype type, void *blocks, size_t n)
{
    const struct keel_dtype_info *info = keel_dtype_info(type);
    for (size_t i = 0; i < n / info->block_elems; i++) {
        uint8_t *b = (uint8_t *)blocks + i * info->block_bytes;
        if (info->block_elems == 1) {
            put_float(rng, type, b);
            continue;
        }
        for (uint32_t j = 0; j < info->block_bytes; j++) {
            b[j] = (uint8_t)keel_rng_u32(rng);
        }
        switch (type) { // unit: about 1 / the largest quant
        case KEEL_Q4_0:
            put_scale(rng, b, 0.15);
            break;
        case KEEL_Q5_0:
            put_scale(rng, b, 0.07);
            break;
        case KEEL_Q8_0:
            put_scale(rng, b, 0.01);
            break;
        case KEEL_Q4_1:
        case KEEL_Q5_1:
            put_scale(rng, b, type == KEEL_Q4_1 ? 0.1 : 0.05);
            put_scale(rng, b + 2, 0.8);
            break;
        case KEEL_Q4_K:
        case KEEL_Q5_K:
            put_scale(rng, b, type == KEEL_Q4_K ? 0.004 : 0.002);
            put_scale(rng, b + 2, 0.03);
            break;
        default: // Q6_K
            put_scale(rng, b + 208, 0.0005);
            break;
        }
    }
}

// --- key/value caches -----------------------------------------------------------------------------

static int blocks_of(int d)
{
    return (d + 31) / 32;
}

size_t ref_kv_words(enum keel_dtype type, int d)
{
    const size_t words = type == KEEL_F16 ? ((size_t)d + 1) / 2 : 9 * (size_t)blocks_of(d);
    return (words + 3) / 4 * 4;
}

static void pack_q8_0(uint32_t *words, const double *x, int d)
{
    for (int b = 0; b < blocks_of(d); b++) {
        const int n = d - 32 * b < 32 ? d - 32 * b : 32;
        double most = 0;
        for (int i = 0; i < n; i++) {
            most = fmax(most, fabs(x[32 * b + i]));
        }
        const float scale = (float)(most / 127);
        for (int i = 0; i < n; i++) {
            const int code = scale > 0 ? (int)fmax(-127, fmin(127, rint(x[32 * b + i] / (double)scale))) : 0;
            words[8 * b + i / 4] |= ((uint32_t)code & 255u) << 8 * (i % 4);
        }
        memcpy(&words[8 * blocks_of(d) + b], &scale, 4);
    }
}

void ref_kv_pack(uint32_t *words, double *x, enum keel_dtype type, size_t n, int d)
{
    const size_t stride = ref_kv_words(type, d);
    memset(words, 0, n * stride * 4);
    for (size_t h = 0; h < n; h++) {
        if (type == KEEL_Q8_0) {
            pack_q8_0(words + h * stride, x + h * d, d);
            continue;
        }
        for (int i = 0; i < d; i++) {
            const double v = fmax(-65504, fmin(65504, x[h * d + i]));
            const uint32_t half = fabs(v) < 0x1p-14 ? 0 : keel_f32_to_f16((float)v);
            words[h * stride + i / 2] |= half << 16 * (i % 2);
        }
    }
    ref_kv_unpack(x, words, type, n, d);
}

void ref_kv_unpack(double *x, const uint32_t *words, enum keel_dtype type, size_t n, int d)
{
    const size_t stride = ref_kv_words(type, d);
    for (size_t i = 0; i < n * d; i++) {
        const uint32_t *head = words + i / d * stride;
        const int e = (int)(i % d);
        if (type == KEEL_Q8_0) {
            float scale;
            memcpy(&scale, &head[8 * blocks_of(d) + e / 32], 4);
            x[i] = (double)scale * (int8_t)(head[e / 4] >> 8 * (e % 4));
        } else {
            x[i] = half_at((const uint8_t *)head + 2 * e);
        }
    }
}
