// SPDX-License-Identifier: MIT
// linear_bwd: dx [T, K] = dy [T, N] W, from the same tiles as the forward product. Lane = 16 columns of W; rows are summed one
// after the other onto what dx holds (with add), so neither the device's schedule nor where the rows are cut into dispatches
// changes a bit: the cuts follow measured time.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#ifdef EXCHANGE
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
#include "linear/linear.h"

layout(local_size_x_id = 0) in;                // 64, less for narrow matrices
layout(constant_id = 1) const uint TOKENS = 1; // tokens a lane works on

layout(push_constant) uniform Push { linear_pc pc; };
#ifdef EXCHANGE
layout(set = 0, binding = 1) uniform samplerBuffer dy4;                   // [T, N / 4] of vec4; N is a multiple of 4
#else
layout(set = 0, binding = 1) restrict readonly buffer DY { float dy[]; }; // [T, N]
#endif
layout(set = 0, binding = 2) restrict buffer DX { float dx[]; };          // [T, K]

#include "common/quant.glsl"

// Rows that are unpacked together. On a CPU a sum stays in a register while it goes through them, and the weights wait in the
// first-level cache; on a GPU they would take its registers.
#ifdef EXCHANGE
const uint ROWS = 8;
#else
const uint ROWS = 1;
#endif

void main()
{
    const uint c = gl_WorkGroupID.x * gl_WorkGroupSize.x + gl_LocalInvocationID.x; // group of 16 columns
    const uint cc = min(c, pc.kb * 2u - 1u);
    const uint kb = cc >> 1, p = cc & 1u;
    const uint t0 = pc.t0 + gl_WorkGroupID.y * TOKENS;
    const uint words = tile_words(pc.kb);

    uint row[TOKENS];
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        row[t] = min(t0 + t, pc.n_tokens - 1u) * pc.n_total + pc.row0;
    }
    float acc[16 * TOKENS];
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        [[unroll]] for (uint e = 0; e < 16u; e++) {
            acc[t * 16u + e] = 0.0;
            if (pc.add != 0u && t0 + t < pc.n_tokens && c * 16u + e < pc.k) {
                acc[t * 16u + e] = dx[(t0 + t) * pc.k + c * 16u + e];
            }
        }
    }
    const uint end = min((pc.tile0 + pc.tiles) * 64u, pc.n);
    for (uint n = pc.tile0 * 64u; n < end; n += 8u) {
        const uint base = (n >> 6) * words;
        // Rows beyond the last are zero in W, so any finite dy will do there.
#ifdef EXCHANGE
        // Two lanes hold the eight values of a token, four each.
        vec4 mine[TOKENS];
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            mine[t] = texelFetch(dy4, int(row[t] / 4u + min(n / 4u + (gl_SubgroupInvocationID & 1u), (pc.n - 1u) / 4u)));
        }
#define VALUE(i) subgroupShuffle(mine[t][(i) & 3u], (i) >> 2)
#else
#define VALUE(i) dy[row[t] + min(n + (i), pc.n - 1u)]
#endif
        [[unroll]] for (uint b = 0; b < 8u; b += ROWS) {
            float w[16 * ROWS];
            [[unroll]] for (uint i = 0; i < ROWS; i++) {
                const uint r = (n & 63u) + b + i;
                const Scale s = fetch_scale(base, pc.kb, kb, r, p);
                float v[16];
                fetch16(base, pc.kb, kb, r, p, s, v);
                [[unroll]] for (uint e = 0; e < 16u; e++) {
                    w[i * 16u + e] = v[e];
                }
            }
            [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                float g[ROWS];
                [[unroll]] for (uint i = 0; i < ROWS; i++) {
                    g[i] = VALUE(b + i);
                }
                [[unroll]] for (uint e = 0; e < 16u; e++) {
                    [[unroll]] for (uint i = 0; i < ROWS; i++) {
                        acc[t * 16u + e] += g[i] * w[i * 16u + e];
                    }
                }
            }
        }
    }
    if (c < pc.kb * 2u) {
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            if (t0 + t < pc.n_tokens) {
                [[unroll]] for (uint e = 0; e < 16u; e++) {
                    const uint col = c * 16u + e;
                    if (col < pc.k) {
                        dx[(t0 + t) * pc.k + col] = acc[t * 16u + e];
                    }
                }
            }
        }
    }
}
