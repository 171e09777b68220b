// SPDX-License-Identifier: MIT
// base/dtype.c: tensor types with their block sizes, and 16-bit float conversions.
// Block sizes: ggml-common.h of llama.cpp, "block_q4_0" and following.
#include "base.h"

#include <string.h>
#include <strings.h>

static const struct keel_dtype_info types[] = {
    { KEEL_F32, "F32", 1, 4 },      { KEEL_F16, "F16", 1, 2 },      { KEEL_BF16, "BF16", 1, 2 },
    { KEEL_Q4_0, "Q4_0", 32, 18 },  { KEEL_Q4_1, "Q4_1", 32, 20 },  { KEEL_Q5_0, "Q5_0", 32, 22 },
    { KEEL_Q5_1, "Q5_1", 32, 24 },  { KEEL_Q8_0, "Q8_0", 32, 34 },  { KEEL_Q4_K, "Q4_K", 256, 144 },
    { KEEL_Q5_K, "Q5_K", 256, 176 }, { KEEL_Q6_K, "Q6_K", 256, 210 },
};

const struct keel_dtype_info *keel_dtype_info(uint32_t ggml_type)
{
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        if ((uint32_t)types[i].type == ggml_type) {
            return &types[i];
        }
    }
    return NULL;
}

const struct keel_dtype_info *keel_dtype_by_name(const char *name)
{
    for (size_t i = 0; i < KEEL_COUNT(types); i++) {
        if (strcasecmp(types[i].name, name) == 0) {
            return &types[i];
        }
    }
    return NULL;
}

static float from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static uint32_t to_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

float keel_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    const uint32_t exp = (h >> 10) & 31u;
    const uint32_t man = h & 1023u;
    if (exp == 31u) {
        return from_bits(sign | 0x7f800000u | man << 13);
    }
    if (exp == 0) { // zero or subnormal: man × 2^-24 is exact in f32
        const float f = (float)man * 0x1p-24f;
        return from_bits(to_bits(f) | sign);
    }
    return from_bits(sign | (exp + 112u) << 23 | man << 13);
}

uint16_t keel_f32_to_f16(float f)
{
    const uint32_t u = to_bits(f);
    const uint16_t sign = (uint16_t)(u >> 16 & 0x8000u);
    const uint32_t mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | (mag >> 13 & 0x3ffu));
    }
    if (mag >= 0x477ff000u) { // 65520 and above round to infinity
        return (uint16_t)(sign | 0x7c00u);
    }
    if (mag < 0x38800000u) { // below 2^-14: subnormal; adding 0.5 aligns the bits and rounds to even
        const float r = from_bits(mag) + 0.5f;
        return (uint16_t)(sign | (to_bits(r) - 0x3f000000u));
    }
    const uint32_t odd = mag >> 13 & 1u;
    return (uint16_t)(sign | (mag - 0x38000000u + 0xfffu + odd) >> 13);
}

float keel_bf16_to_f32(uint16_t h)
{
    return from_bits((uint32_t)h << 16);
}

uint16_t keel_f32_to_bf16(float f)
{
    const uint32_t u = to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(u >> 16 | 0x40u);
    }
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
