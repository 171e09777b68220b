// SPDX-License-Identifier: MIT
// linear_fwd: y [T, N] = x [T, K] Wᵀ. Lane = row of W, so that weights are read once, in order, and x is the same address for
// all lanes; no lane needs another unless K is cut into slices.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#ifdef EXCHANGE
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_KHR_shader_subgroup_ballot : require
#endif
#include "linear/linear.h"

layout(local_size_x_id = 0) in;                // 64 × SLICES
layout(constant_id = 1) const uint TILES = 1;  // tiles of rows a lane works on
layout(constant_id = 2) const uint TOKENS = 1; // tokens a lane works on
layout(constant_id = 3) const uint SLICES = 1; // parts of K, summed through shared memory
layout(constant_id = 4) const bool TAIL = false; // K is no multiple of 32

layout(push_constant) uniform Push { linear_pc pc; };
layout(set = 0, binding = 1) restrict readonly buffer X { float x[]; }; // [T, K]
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
        Scale s[TILES];
        [[unroll]] for (uint p = 0; p < 2u; p++) {
            float w[TILES * 16];
            [[unroll]] for (uint a = 0; a < TILES; a++) {
                if (p == 0u || !ONE_SCALE) {
                    s[a] = fetch_scale(base[a], pc.kb, kb, r, p);
                }
                float v[16];
                fetch16(base[a], pc.kb, kb, r, p, s[a], v);
                [[unroll]] for (uint i = 0; i < 16u; i++) {
                    w[a * 16u + i] = v[i];
                }
            }
            [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                [[unroll]] for (uint e = 0; e < 16u; e += 8u) {
                    // W is zero beyond K, so any finite x will do there.
#define COLUMN(i) (TAIL ? min(kb * 32u + 16u * p + e + (i), pc.k - 1u) : kb * 32u + 16u * p + e + (i))
#ifdef EXCHANGE
                    const float mine = x[row[t] + COLUMN(gl_SubgroupInvocationID & 7u)];
#define VALUE(i) subgroupBroadcast(mine, i)
#else
#define VALUE(i) x[row[t] + COLUMN(i)]
#endif
#define MAC(i) \
    { \
        const float xv = VALUE(i); \
        [[unroll]] for (uint a = 0; a < TILES; a++) { \
            acc[a * TOKENS + t] += w[a * 16u + e + i] * xv; \
        } \
    }
                    MAC(0u) MAC(1u) MAC(2u) MAC(3u) MAC(4u) MAC(5u) MAC(6u) MAC(7u)
                }
            }
        }
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
