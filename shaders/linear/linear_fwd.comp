// SPDX-License-Identifier: MIT
// linear_fwd: y [T, N] = x [T, K] Wᵀ. Lane = row of W, so that weights are read once, in order, and x is the same address for
// all lanes; no lane needs another unless K is cut into slices. Up to three matrices that share x (PARTS); with LORA each gets
// scale · h Bᵀ added; with GLU the two are gate and up, and y = gelu(gate) · up. DOT: for one token and Q8_0 or Q4_0, x is rounded to 8 bits
// with a scale for each 32 and multiplied four at a time, in integers.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#ifdef EXCHANGE
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
#ifdef DOT
#extension GL_EXT_spirv_intrinsics : require
#endif
#include "linear/linear.h"

layout(local_size_x_id = 0) in;                // ROWS × SLICES
layout(constant_id = 1) const uint TILES = 1;  // rows a lane works on, ROWS apart
layout(constant_id = 2) const uint TOKENS = 1; // tokens a lane works on
layout(constant_id = 3) const uint SLICES = 1; // parts of K, summed through shared memory
layout(constant_id = 4) const bool TAIL = false; // K is no multiple of 32
layout(constant_id = 5) const uint PARTS = 1;
layout(constant_id = 6) const bool GLU = false; // of the tiles of a lane, the even ones are gate's, the odd ones up's
layout(constant_id = 7) const bool LORA = false;

#ifdef DOT
layout(constant_id = 8) const uint KB = 1; // pc.kb
#endif

layout(push_constant) uniform Push { linear_fwd_pc pc; };
#ifdef EXCHANGE
layout(set = 0, binding = 1) uniform samplerBuffer x4;                  // [T, K / 4] of vec4; K is a multiple of 4
#else
layout(set = 0, binding = 1) restrict readonly buffer X { float x[]; }; // [T, K]
#endif
layout(set = 0, binding = 2) buffer Y { float y[]; };                   // [T, N] of each part
layout(set = 0, binding = 3) readonly buffer H { float h[]; };          // [T, r] of each part
layout(set = 0, binding = 4) readonly buffer B { float b[]; };          // [N, r] of each part

#include "common/quant.glsl"
#include "ewise/gelu.glsl"

// On a GPU 64, a tile, so that neighbouring lanes read neighbouring words. On a CPU one subgroup, whose rows lie next to each other for all
// of TILES: it runs through K alone, and reads whole kilobytes in order instead of a pair of cache lines in each.
const uint ROWS = gl_WorkGroupSize.x / SLICES;

shared float sums[SLICES > 1 ? (SLICES - 1) * 64 * TILES * TOKENS : 1];

#define PART(p, field) \
    (PARTS == 1u || (p) == 0u ? pc.part[0].field : PARTS == 2u || (p) == 1u ? pc.part[1].field : pc.part[2].field)

#ifdef DOT
#include "linear/dot.glsl"
#endif

// On a CPU codes are multiplied as they lie, by activations that the lanes which hold them have scaled, and a block's scale and minimum
// go out of its sum, d Σ code x + m Σ x: half of the operations that unpacking takes.
#if defined(EXCHANGE) && defined(NIBBLES)
#define CODES
#endif

uint part_of(uint tile)
{
    return PARTS == 1u || tile < pc.part[1].tile ? 0u : PARTS == 2u || tile < pc.part[2].tile ? 1u : 2u;
}

void main()
{
    const uint lane = SLICES == 1 ? gl_LocalInvocationID.x : gl_LocalInvocationID.x % ROWS;
    const uint slice = SLICES == 1 ? 0u : gl_LocalInvocationID.x / ROWS;
    const uint t0 = pc.t0 + gl_WorkGroupID.y * TOKENS;
    const uint words = tile_words(pc.kb);
    const uint last_tile = pc.tiles - 1u;

    uint base[TILES], part[TILES], n[TILES], r[TILES]; // n: row within its part, r: within its tile
    bool inside[TILES];
    [[unroll]] for (uint a = 0; a < TILES; a++) {
        // First of the rows of a step, within the dispatch; ROWS divides a tile, so that it is one tile for all lanes.
        const uint first = (gl_WorkGroupID.x * (GLU ? TILES / 2u : TILES) + (GLU ? a / 2u : a)) * ROWS;
        const uint at = pc.tile0 + min(first / 64u, last_tile);
        inside[a] = first / 64u < pc.tiles;
        r[a] = first % 64u + lane;
        part[a] = GLU ? a & 1u : part_of(at);
        base[a] = PART(part[a], w) + (at - PART(part[a], tile)) * words;
        n[a] = (at - PART(part[a], tile)) * 64u + r[a];
    }
    uint row[TOKENS];
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        row[t] = min(t0 + t, pc.n_tokens - 1u) * pc.k;
    }
    float acc[TILES * TOKENS];
    [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
        acc[i] = 0.0;
    }
#ifdef DOT
    round_x(row[0]);
    for (uint kb = slice; kb < KB; kb += SLICES) {
        [[unroll]] for (uint a = 0; a < TILES; a++) {
            acc[a] += fetch_scale(base[a], KB, kb, r[a], 0u).d * x_scale[kb] * float(dot32(base[a], kb, r[a]));
        }
    }
#else
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
            s[a] = fetch_scale(base[a], pc.kb, kb, r[a], 0u);
        }
#ifdef CODES
        const vec4 down = (gl_SubgroupInvocationID & 1u) == 0u
                            ? vec4(1.0, 0.0625, 0.00390625, 0.000244140625) // 16^-c for c % 8 = 0 ... 3
                            : vec4(1.52587890625e-5, 9.5367431640625e-7, 5.9604644775390625e-8, 1.0); // 4 ... 6; 7 lies as it is
        float w[TILES * 32];
        Scale s1[TILES];
        [[unroll]] for (uint a = 0; a < TILES; a++) {
            s1[a] = ONE_SCALE ? s[a] : fetch_scale(base[a], pc.kb, kb, r[a], 1u);
            float v[32];
            fetch_codes(base[a], pc.kb, kb, r[a], v);
            [[unroll]] for (uint i = 0; i < 32u; i++) {
                w[a * 32u + i] = v[i];
            }
        }
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            const float four = mine[t].x + mine[t].y + mine[t].z + mine[t].w;
            mine[t] *= down;
            float sum[2], qx[TILES];
            [[unroll]] for (uint p = 0; p < 2u; p++) {
                sum[p] = subgroupShuffle(four, 4u * p);
                [[unroll]] for (uint i = 1; i < 4u; i++) {
                    sum[p] += subgroupShuffle(four, 4u * p + i);
                }
            }
            [[unroll]] for (uint p = 0; p < 2u; p++) {
                [[unroll]] for (uint i = 0; i < 16u; i++) {
                    const float xv = VALUE(p * 16u + i);
                    [[unroll]] for (uint a = 0; a < TILES; a++) {
                        const bool fresh = i == 0u && (p == 0u || !ONE_SCALE);
                        qx[a] = w[a * 32u + p * 16u + i] * xv + (fresh ? 0.0 : qx[a]);
                    }
                }
                [[unroll]] for (uint a = 0; a < TILES; a++) {
                    if (ONE_SCALE && p == 1u) {
                        acc[a * TOKENS + t] += s[a].d * qx[a] + s[a].m * (sum[0] + sum[1]);
                    } else if (!ONE_SCALE) {
                        acc[a * TOKENS + t] += p == 0u ? s[a].d * qx[a] + s[a].m * sum[0] : s1[a].d * qx[a] + s1[a].m * sum[1];
                    }
                }
            }
        }
#else
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
            fetch16(base[a], pc.kb, kb, r[a], P, s[a], v); \
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
                s[a] = fetch_scale(base[a], pc.kb, kb, r[a], 1u);
            }
        }
        HALF_BLOCK
#undef P
#endif
    }
#endif
    if (SLICES > 1) {
        if (slice > 0) {
            [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
                sums[((slice - 1u) * TILES * TOKENS + i) * ROWS + lane] = acc[i];
            }
        }
        barrier();
        if (slice == 0) {
            for (uint o = 0; o < SLICES - 1u; o++) {
                [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
                    acc[i] += sums[(o * TILES * TOKENS + i) * ROWS + lane];
                }
            }
        }
    }
    if (LORA && slice == 0) {
        uint b_row[TILES], h_row[TILES];
        [[unroll]] for (uint a = 0; a < TILES; a++) {
            b_row[a] = PART(part[a], b) + min(n[a], PART(part[a], n) - 1u) * pc.rank;
            h_row[a] = PART(part[a], h);
        }
        // The tiles inside the loop over the rank: Mesa unrolls no loop that holds a loop, and acc with a variable index is memory.
        for (uint c = 0; c < pc.rank; c++) {
            [[unroll]] for (uint a = 0; a < TILES; a++) {
                const float bv = PART(part[a], scale) * b[b_row[a] + c];
                [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                    acc[a * TOKENS + t] += bv * h[h_row[a] + min(t0 + t, pc.n_tokens - 1u) * pc.rank + c];
                }
            }
        }
    }
    if (slice == 0) {
        [[unroll]] for (uint a = 0; a < TILES; a += GLU ? 2u : 1u) {
            const uint rows = PART(part[a], n);
            if (inside[a] && n[a] < rows) {
                [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                    if (t0 + t < pc.n_tokens) {
                        const uint at = PART(part[a], y) + (t0 + t) * (PARTS == 1u ? pc.n_total : rows) + pc.row0 + n[a];
                        const float v = GLU ? gelu(acc[a * TOKENS + t]) * acc[min(a + 1u, TILES - 1u) * TOKENS + t]
                                            : acc[a * TOKENS + t];
                        y[at] = pc.add != 0u ? y[at] + v : v;
                    }
                }
            }
        }
    }
}
