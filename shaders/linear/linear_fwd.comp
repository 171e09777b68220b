// SPDX-License-Identifier: MIT
// linear_fwd: y [T, N] = x [T, K] Wᵀ. Lane = row of W, so that weights are read once, in order, and x is the same address for
// all lanes; no lane needs another unless K is cut into slices.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#ifdef EXCHANGE
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
#include "linear/linear.h"

layout(local_size_x_id = 0) in;                // 64 × SLICES
layout(constant_id = 1) const uint TILES = 1;  // tiles of rows a lane works on
layout(constant_id = 2) const uint TOKENS = 1; // tokens a lane works on
layout(constant_id = 3) const uint SLICES = 1; // parts of K, summed through shared memory
layout(constant_id = 4) const bool TAIL = false; // K is no multiple of 32

layout(push_constant) uniform Push { linear_pc pc; };
#ifdef EXCHANGE
layout(set = 0, binding = 1) uniform samplerBuffer x4;                  // [T, K / 4] of vec4; K is a multiple of 4
#else
layout(set = 0, binding = 1) restrict readonly buffer X { float x[]; }; // [T, K]
#endif
layout(set = 0, binding = 2) restrict buffer Y { float y[]; };          // [T, N]

#include "common/quant.glsl"

shared float part[SLICES > 1 ? (SLICES - 1) * 64 * TILES * TOKENS : 1];

void main()
{
    const uint r = SLICES == 1 ? gl_LocalInvocationID.x : gl_LocalInvocationID.x % 64u;
    const uint slice = SLICES == 1 ? 0u : gl_LocalInvocationID.x / 64u;
    const uint tile = gl_WorkGroupID.x * TILES;
    const uint t0 = pc.t0 + gl_WorkGroupID.y * TOKENS;
    const uint words = tile_words(pc.kb);
    const uint last_tile = pc.tiles - 1u;

    uint base[TILES];
    [[unroll]] for (uint a = 0; a < TILES; a++) {
        base[a] = (pc.tile0 + min(tile + a, last_tile)) * words;
    }
    uint row[TOKENS];
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        row[t] = min(t0 + t, pc.n_tokens - 1u) * pc.k;
    }
    float acc[TILES * TOKENS];
    [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
        acc[i] = 0.0;
    }
    for (uint kb = slice; kb < pc.kb; kb += SLICES) {
#ifdef EXCHANGE
        // Eight lanes hold the 32 values of a token's block, four each.
        vec4 mine[TOKENS];
        const uint quad4 = kb * 8u + (gl_SubgroupInvocationID & 7u);
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            mine[t] = texelFetch(x4, int(row[t] / 4u + (TAIL ? min(quad4, pc.k / 4u - 1u) : quad4)));
        }
#define VALUE(i) subgroupShuffle(mine[t][(i) & 3u], (i) >> 2)
#else
        // W is zero beyond K, so any finite x will do there.
#define VALUE(i) x[row[t] + (TAIL ? min(kb * 32u + (i), pc.k - 1u) : kb * 32u + (i))]
#endif
        Scale s[TILES];
        [[unroll]] for (uint a = 0; a < TILES; a++) {
            s[a] = fetch_scale(base[a], pc.kb, kb, r, 0u);
        }
#define MAC(i) \
    { \
        const float xv = VALUE(P * 16u + i); \
        [[unroll]] for (uint a = 0; a < TILES; a++) { \
            acc[a * TOKENS + t] += w[a * 16u + i] * xv; \
        } \
    }
#define HALF_BLOCK \
    { \
        float w[TILES * 16]; \
        [[unroll]] for (uint a = 0; a < TILES; a++) { \
            float v[16]; \
            fetch16(base[a], pc.kb, kb, r, P, s[a], v); \
            [[unroll]] for (uint i = 0; i < 16u; i++) { \
                w[a * 16u + i] = v[i]; \
            } \
        } \
        [[unroll]] for (uint t = 0; t < TOKENS; t++) { \
            MAC(0u) MAC(1u) MAC(2u) MAC(3u) MAC(4u) MAC(5u) MAC(6u) MAC(7u) \
            MAC(8u) MAC(9u) MAC(10u) MAC(11u) MAC(12u) MAC(13u) MAC(14u) MAC(15u) \
        } \
    }
#define P 0u
        HALF_BLOCK
#undef P
#define P 1u
        if (!ONE_SCALE) {
            [[unroll]] for (uint a = 0; a < TILES; a++) {
                s[a] = fetch_scale(base[a], pc.kb, kb, r, 1u);
            }
        }
        HALF_BLOCK
#undef P
    }
    if (SLICES > 1) {
        if (slice > 0) {
            [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
                part[((slice - 1u) * TILES * TOKENS + i) * 64u + r] = acc[i];
            }
        }
        barrier();
        if (slice == 0) {
            for (uint o = 0; o < SLICES - 1u; o++) {
                [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
                    acc[i] += part[(o * TILES * TOKENS + i) * 64u + r];
                }
            }
        }
    }
    if (slice == 0) {
        [[unroll]] for (uint a = 0; a < TILES; a++) {
            const uint n = (pc.tile0 + tile + a) * 64u + r;
            if (tile + a < pc.tiles && n < pc.n) {
                [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                    if (t0 + t < pc.n_tokens) {
                        const uint at = (t0 + t) * pc.n_total + pc.row0 + n;
                        y[at] = pc.add != 0u ? y[at] + acc[a * TOKENS + t] : acc[a * TOKENS + t];
                    }
                }
            }
        }
    }
}
