// SPDX-License-Identifier: MIT
// shaders/common/quant.glsl: reading weights in tile layout. One of the macros Q_F32 ... Q_Q6_K selects the type.
//
// A tile is 64 rows. Its sections follow each other; KB is the number of 32-column blocks, SB of 256-column blocks:
//   Q4_*  q [KB][64] uvec4 (32 × 4 bits)                       F32  q [KB][8][64] uvec4 (4 floats)
//   Q5_*  the same, then h [KB][64] u32 (the fifth bits)       F16  q [KB][4][64] uvec4 (8 halves), BF16 alike
//   Q8_0  q [KB][2][64] uvec4 (16 × 8 bits)                    Q6_K q as Q4, then h [KB][64] 2 × u32 (the upper 2 bits)
// then scales: _0 types s [KB][32] u32 (f16 of rows 2i and 2i+1); _1 types s [KB][64] u32 (f16 scale, f16 minimum);
// Q4_K, Q5_K s [SB][64] uvec4 (8 × (u8 scale, u8 minimum)), d [SB][64] u32 (f16 scale, f16 minimum scale);
// Q6_K s [SB][64] uvec4 (16 × s8), d [SB][32] u32 (f16 of rows 2i and 2i+1).
// The packer is src/ops/tile.c; both follow docs/formats.md "tiles".
//
// The weights are binding 0 of the including shader.

#include "common/half.glsl"

#ifdef EXCHANGE
// CPU drivers read storage buffers lane by lane with a branch for each, texels without: 2.5 times as fast on lavapipe 22.3.
layout(set = 0, binding = 0) uniform usamplerBuffer w_texels;

uvec4 quad(uint at)
{
    return texelFetch(w_texels, int(at));
}

uint word(uint at)
{
    return texelFetch(w_texels, int(at >> 2))[at & 3u];
}

uvec2 word_pair(uint at)
{
    const uvec4 v = texelFetch(w_texels, int(at >> 2));
    return (at & 2u) == 0u ? v.xy : v.zw;
}
#else
layout(set = 0, binding = 0) restrict readonly buffer W { uint w_words[]; };
layout(set = 0, binding = 0) restrict readonly buffer W4 { uvec4 w_quads[]; };

uvec4 quad(uint at)
{
    return w_quads[at];
}

uint word(uint at)
{
    return w_words[at];
}

uvec2 word_pair(uint at)
{
    return uvec2(w_words[at], w_words[at + 1u]);
}
#endif

struct Scale {
    float d, m; // weight = d * q + m
};

#if defined(Q_Q4_K) || defined(Q_Q5_K) || defined(Q_Q6_K)
#define K_QUANT
#endif
#if defined(Q_F32) || defined(Q_F16) || defined(Q_BF16)
#define FLOAT_TYPE
#endif

// Whether both halves of a block share a scale.
#if defined(Q_Q6_K)
#define ONE_SCALE false
#else
#define ONE_SCALE true
#endif

uint tile_words(uint kb_n)
{
#if defined(Q_F32)
    return kb_n * 2048u;
#elif defined(Q_F16) || defined(Q_BF16)
    return kb_n * 1024u;
#elif defined(Q_Q4_0)
    return kb_n * (256u + 32u);
#elif defined(Q_Q4_1)
    return kb_n * (256u + 64u);
#elif defined(Q_Q5_0)
    return kb_n * (256u + 64u + 32u);
#elif defined(Q_Q5_1)
    return kb_n * (256u + 64u + 64u);
#elif defined(Q_Q8_0)
    return kb_n * (512u + 32u);
#elif defined(Q_Q4_K)
    return kb_n * 256u + kb_n / 8u * (256u + 64u);
#elif defined(Q_Q5_K)
    return kb_n * (256u + 64u) + kb_n / 8u * (256u + 64u);
#elif defined(Q_Q6_K)
    return kb_n * (256u + 128u) + kb_n / 8u * (256u + 32u);
#endif
}

float half_of(uint word, uint which)
{
    return unpack_half(word >> (16u * which)).x;
}

// Scale of columns 16p .. 16p+15 of block kb in row r of the tile whose first word is `base`; kb_n is KB.
Scale fetch_scale(uint base, uint kb_n, uint kb, uint r, uint p)
{
#if defined(FLOAT_TYPE)
    return Scale(1.0, 0.0);
#elif defined(Q_Q4_0)
    const float d = half_of(word(base + kb_n * 256u + kb * 32u + (r >> 1)), r & 1u);
    return Scale(d, -8.0 * d);
#elif defined(Q_Q5_0)
    const float d = half_of(word(base + kb_n * 320u + kb * 32u + (r >> 1)), r & 1u);
    return Scale(d, -16.0 * d);
#elif defined(Q_Q8_0)
    const float d = half_of(word(base + kb_n * 512u + kb * 32u + (r >> 1)), r & 1u);
    return Scale(d, 0.0);
#elif defined(Q_Q4_1)
    const vec2 dm = unpack_half(word(base + kb_n * 256u + kb * 64u + r));
    return Scale(dm.x, dm.y);
#elif defined(Q_Q5_1)
    const vec2 dm = unpack_half(word(base + kb_n * 320u + kb * 64u + r));
    return Scale(dm.x, dm.y);
#elif defined(Q_Q4_K) || defined(Q_Q5_K)
#if defined(Q_Q4_K)
    const uint s = base + kb_n * 256u;
#else
    const uint s = base + kb_n * 320u;
#endif
    const uint sb = kb >> 3;
    const uint pair = word(s + (sb * 64u + r) * 4u + ((kb & 7u) >> 1)) >> (16u * (kb & 1u));
    const vec2 dm = unpack_half(word(s + kb_n * 32u + sb * 64u + r));
    return Scale(dm.x * float(pair & 255u), -dm.y * float(pair >> 8 & 255u));
#elif defined(Q_Q6_K)
    const uint s = base + kb_n * 384u;
    const uint sb = kb >> 3;
    const uint i = (kb & 7u) * 2u + p; // which of the 16 sub-blocks
    const int sc = bitfieldExtract(int(word(s + (sb * 64u + r) * 4u + (i >> 2))), int(i & 3u) * 8, 8);
    const float d = half_of(word(s + kb_n * 32u + sb * 32u + (r >> 1)), r & 1u) * float(sc);
    return Scale(d, -32.0 * d);
#endif
}

// The weights of columns 16p .. 16p+15 of block kb in row r, with their scale.
void fetch16(uint base, uint kb_n, uint kb, uint r, uint p, Scale s, out float w[16])
{
#if defined(Q_F32)
    [[unroll]] for (uint c = 0; c < 4u; c++) {
        const uvec4 a = quad(base / 4u + (kb * 8u + 4u * p + c) * 64u + r);
        [[unroll]] for (uint i = 0; i < 4u; i++) {
            w[4u * c + i] = uintBitsToFloat(a[i]);
        }
    }
#elif defined(Q_F16) || defined(Q_BF16)
    [[unroll]] for (uint c = 0; c < 2u; c++) {
        const uvec4 a = quad(base / 4u + (kb * 4u + 2u * p + c) * 64u + r);
        [[unroll]] for (uint i = 0; i < 4u; i++) {
#if defined(Q_F16)
            const vec2 v = unpack_half(a[i]);
#else
            const vec2 v = vec2(uintBitsToFloat(a[i] << 16), uintBitsToFloat(a[i] & 0xffff0000u));
#endif
            w[8u * c + 2u * i] = v.x;
            w[8u * c + 2u * i + 1u] = v.y;
        }
    }
#elif defined(Q_Q8_0)
    const uvec4 a = quad(base / 4u + (kb * 2u + p) * 64u + r);
    [[unroll]] for (uint i = 0; i < 16u; i++) {
        w[i] = s.d * float(bitfieldExtract(int(a[i >> 2]), int(8u * (i & 3u)), 8));
    }
#else
    const uvec2 q = word_pair(base + (kb * 64u + r) * 4u + 2u * p);
#if defined(Q_Q5_0) || defined(Q_Q5_1) || defined(Q_Q5_K)
    const uint h = word(base + kb_n * 256u + kb * 64u + r) >> (16u * p);
    [[unroll]] for (uint i = 0; i < 16u; i++) {
        w[i] = s.d * float((q[i >> 3] >> (4u * (i & 7u)) & 15u) | (h >> i & 1u) << 4) + s.m;
    }
#elif defined(Q_Q6_K)
    const uint h = word(base + kb_n * 256u + (kb * 64u + r) * 2u + p);
    [[unroll]] for (uint i = 0; i < 16u; i++) {
        w[i] = s.d * float((q[i >> 3] >> (4u * (i & 7u)) & 15u) | (h >> (2u * i) & 3u) << 4) + s.m;
    }
#else
    [[unroll]] for (uint i = 0; i < 16u; i++) {
        w[i] = s.d * float(q[i >> 3] >> (4u * (i & 7u)) & 15u) + s.m;
    }
#endif
#endif
}

#if !defined(FLOAT_TYPE) && !defined(Q_Q8_0)
#define NIBBLES
// The codes of block kb in row r, weight = d · code + m; that of column c as it lies in its word, code · 16^(c % 8), but of c % 8 = 7,
// which would take the sign bit, as it is. A mask does that where moving bits down takes two operations.
void fetch_codes(uint base, uint kb_n, uint kb, uint r, out float w[32])
{
    const uvec4 q = quad(base / 4u + kb * 64u + r);
#if defined(Q_Q5_0) || defined(Q_Q5_1) || defined(Q_Q5_K)
    const uint h = word(base + kb_n * 256u + kb * 64u + r);
#define UPPER(i) (h >> (i) & 1u)
#define UPPER_AT(i, at) ((at) >= (i) ? h << ((at) - (i)) : h >> ((i) - (at))) & 1u << (at)
#elif defined(Q_Q6_K)
    const uvec2 both = word_pair(base + kb_n * 256u + (kb * 64u + r) * 2u);
#define UPPER(i) (both[(i) >> 4] >> 2u * ((i) & 15u) & 3u)
#define UPPER_AT(i, at) \
    ((at) >= 2u * ((i) & 15u) ? both[(i) >> 4] << ((at) - 2u * ((i) & 15u)) : both[(i) >> 4] >> (2u * ((i) & 15u) - (at))) & 3u << (at)
#else
#define UPPER(i) 0u
#define UPPER_AT(i, at) 0u
#endif
    [[unroll]] for (uint i = 0; i < 32u; i++) {
        const uint j = i & 7u, word = q[i >> 3];
        w[i] = float(int(j == 7u ? word >> 28 | UPPER(i) << 4 : (word & 15u << 4u * j) | (UPPER_AT(i, 4u * j + 4u))));
    }
}
#endif
