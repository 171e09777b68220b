// SPDX-License-Identifier: MIT
// shaders/attention/attn_kv.glsl: operand b of attention at binding 1, [R, G, d] as common/kv.glsl says. `at`: where a head begins.
//   b_one(at, d, e)      element e of the head
//   B_EIGHT(v, at, d, e) declares v[8], elements e ... e + 7 of a head of d elements; e is a multiple of eight and e + 8 <= d
#include "common/exchange.glsl"
#include "common/half.glsl"
#include "common/kv.glsl"

#ifdef KV_PACKED
WORDS(1, b)
#else
OPERAND(1, b)
#endif

float b_one(uint at, uint d, uint e)
{
#ifdef KV_F16
    return unpack_half(b(at + (e >> 1)))[e & 1u];
#elif defined(KV_Q8_0)
    const float scale = uintBitsToFloat(b(at + kv_scales(d) + e / KV_BLOCK));
    return scale * float(bitfieldExtract(int(b(at + (e >> 2))), int(e & 3u) * 8, 8));
#else
    return b(at + e);
#endif
}

#ifdef KV_F16
#define B_EIGHT(v, at, d, e) \
    float v[8]; \
    { \
        const uvec4 words = b_four((at) + (e) / 2u); \
        [[unroll]] for (uint i = 0; i < 4u; i++) { \
            const vec2 two = unpack_half(words[i]); \
            v[2u * i] = two.x; \
            v[2u * i + 1u] = two.y; \
        } \
    }
#elif defined(KV_Q8_0)
#define B_EIGHT(v, at, d, e) \
    float v[8]; \
    { \
        const float scale = uintBitsToFloat(b((at) + kv_scales(d) + (e) / KV_BLOCK)); \
        [[unroll]] for (uint i = 0; i < 2u; i++) { \
            const int word = int(b((at) + (e) / 4u + i)); \
            [[unroll]] for (int j = 0; j < 4; j++) { \
                v[4u * i + uint(j)] = scale * float(bitfieldExtract(word, 8 * j, 8)); \
            } \
        } \
    }
#else
#define B_EIGHT(v, at, d, e) \
    float v[8]; \
    [[unroll]] for (uint i = 0; i < 8u; i++) { \
        v[i] = b((at) + (e) + i); \
    }
#endif
