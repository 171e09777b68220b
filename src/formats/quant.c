// SPDX-License-Identifier: MIT
// formats/quant.c: GGML's block types to f32, the CPU reference that the GPU's unpacking is checked against.
// Block layouts: ggml-common.h of llama.cpp. Sub-expressions stand in statements of their own where a
// compiler could otherwise fuse a product and a sum, so that results are the same bits everywhere.
#include "formats.h"

#include <string.h>

static uint16_t get16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static float get_f16(const uint8_t *p)
{
    return keel_f16_to_f32(get16(p));
}

static void from_q4_0(const uint8_t *b,
                      float *y) // d, 16 bytes: low nibbles are elements 0-15, high nibbles 16-31
{
    const float d = get_f16(b);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)((b[2 + i] & 15) - 8);
        y[i + 16] = d * (float)((b[2 + i] >> 4) - 8);
    }
}

static void from_q4_1(const uint8_t *b, float *y) // d, m, nibbles as Q4_0
{
    const float d = get_f16(b), m = get_f16(b + 2);
    for (int i = 0; i < 16; i++) {
        const float lo = d * (float)(b[4 + i] & 15);
        const float hi = d * (float)(b[4 + i] >> 4);
        y[i] = lo + m;
        y[i + 16] = hi + m;
    }
}

// Element i of 32 of a Q5_0 or Q5_1 block: fifth bits in 4 bytes, then nibbles as Q4_0.
static int get_q5(const uint8_t *qh, int i)
{
    const uint8_t *qs = qh + 4;
    const int low = i < 16 ? qs[i] & 15 : qs[i - 16] >> 4;
    return low | (qh[i / 8] >> (i % 8) & 1) << 4;
}

static void from_q5_0(const uint8_t *b, float *y)
{
    const float d = get_f16(b);
    for (int i = 0; i < 32; i++) {
        y[i] = d * (float)(get_q5(b + 2, i) - 16);
    }
}

static void from_q5_1(const uint8_t *b, float *y)
{
    const float d = get_f16(b), m = get_f16(b + 2);
    for (int i = 0; i < 32; i++) {
        const float p = d * (float)get_q5(b + 4, i);
        y[i] = p + m;
    }
}

static void from_q8_0(const uint8_t *b, float *y)
{
    const float d = get_f16(b);
    for (int i = 0; i < 32; i++) {
        y[i] = d * (float)(int8_t)b[2 + i];
    }
}

// Six-bit scale and minimum of sub-block j of 8, packed in 12 bytes.
static void get_scale_min(const uint8_t *s, int j, int *scale, int *min)
{
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
        *min = s[j + 4] >> 4 | s[j] >> 6 << 4;
    }
}

// Q4_K (`qh` NULL) and Q5_K: d, dmin, 12 bytes of scales, then [32 fifth bits of 8 sub-blocks,] 128 bytes of
// nibbles: 32 bytes carry sub-block 2k in their low and 2k + 1 in their high halves.
static void from_q45_k(const uint8_t *b, const uint8_t *qh, const uint8_t *qs, float *y)
{
    const float d = get_f16(b), dmin = get_f16(b + 2);
    for (int j = 0; j < 8; j++) {
        int scale, min;
        get_scale_min(b + 4, j, &scale, &min);
        const float ds = d * (float)scale, ms = dmin * (float)min;
        for (int i = 0; i < 32; i++) {
            const uint8_t byte = qs[j / 2 * 32 + i];
            int q = j % 2 ? byte >> 4 : byte & 15;
            if (qh) {
                q |= (qh[i] >> j & 1) << 4;
            }
            const float p = ds * (float)q;
            y[j * 32 + i] = p - ms;
        }
    }
}

static void from_q4_k(const uint8_t *b, float *y)
{
    from_q45_k(b, NULL, b + 16, y);
}

static void from_q5_k(const uint8_t *b, float *y)
{
    from_q45_k(b, b + 16, b + 48, y);
}

// 128 low nibbles, 64 bytes of upper bit pairs, 16 signed scales of 16 elements each, d. In each half of 128
// elements a quarter of 32 takes its nibbles from bytes (quarter % 2) * 32 and its bit pair from position
// quarter * 2.
static void from_q6_k(const uint8_t *b, float *y)
{
    const float d = get_f16(b + 208);
    for (int e = 0; e < 256; e++) {
        const int half = e / 128, quarter = e % 128 / 32, i = e % 32;
        const uint8_t low = b[half * 64 + quarter % 2 * 32 + i];
        const int high = b[128 + half * 32 + i] >> (2 * quarter) & 3;
        const int q = (quarter < 2 ? low & 15 : low >> 4) | high << 4;
        const float ds = d * (float)(int8_t)b[192 + e / 16];
        y[e] = ds * (float)(q - 32);
    }
}

static void from_blocks(const struct keel_dtype_info *info, void (*one)(const uint8_t *, float *),
                        const uint8_t *src, float *dst, size_t n)
{
    for (size_t i = 0; i < n / info->block_elems; i++) {
        one(src + i * info->block_bytes, dst + i * info->block_elems);
    }
}

void keel_dequantize(enum keel_dtype type, const void *src, float *dst, size_t n)
{
    const struct keel_dtype_info *info = keel_dtype_info((uint32_t)type);
    const uint8_t *s = src;
    KEEL_ASSERT(info && n % info->block_elems == 0);
    switch (type) {
    case KEEL_F32:
        if (n > 0) {
            memcpy(dst, src, n * sizeof *dst);
        }
        return;
    case KEEL_F16:
        for (size_t i = 0; i < n; i++) {
            dst[i] = get_f16(s + 2 * i);
        }
        return;
    case KEEL_BF16:
        for (size_t i = 0; i < n; i++) {
            dst[i] = keel_bf16_to_f32(get16(s + 2 * i));
        }
        return;
    case KEEL_Q4_0:
        from_blocks(info, from_q4_0, s, dst, n);
        return;
    case KEEL_Q4_1:
        from_blocks(info, from_q4_1, s, dst, n);
        return;
    case KEEL_Q5_0:
        from_blocks(info, from_q5_0, s, dst, n);
        return;
    case KEEL_Q5_1:
        from_blocks(info, from_q5_1, s, dst, n);
        return;
    case KEEL_Q8_0:
        from_blocks(info, from_q8_0, s, dst, n);
        return;
    case KEEL_Q4_K:
        from_blocks(info, from_q4_k, s, dst, n);
        return;
    case KEEL_Q5_K:
        from_blocks(info, from_q5_k, s, dst, n);
        return;
    case KEEL_Q6_K:
        from_blocks(info, from_q6_k, s, dst, n);
        return;
    }
}
