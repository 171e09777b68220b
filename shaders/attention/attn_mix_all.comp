// SPDX-License-Identifier: MIT
// attn_mix_all: o[t, h, :] = Σ_j P[h, t, j] v[j, g, :] where every token sees every key, their number is a multiple of four, and
// so is the head: patches of an image. Only with EXCHANGE, for CPU drivers. Eight lanes work on 32 tokens and up to 32 elements
// of a head: a lane on four of the tokens, and it reads four of the elements for all eight.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "attention/attention.h"

layout(local_size_x_id = 0) in;              // 64
layout(constant_id = 1) const uint QUADS = 8; // elements / 4 that eight lanes work on
const uint TOKENS = 4;                       // of a lane: ATTENTION_ALL_UNIT / 8

layout(push_constant) uniform Push { attention_pc pc; };
layout(set = 0, binding = 0) uniform samplerBuffer p4; // [H, rows, cols / 4] of vec4
layout(set = 0, binding = 1) uniform samplerBuffer v4; // [R, G, d / 4] of vec4
layout(set = 0, binding = 2) restrict writeonly buffer O { float o[]; }; // [T, H, d]

void main()
{
    const uint h = gl_WorkGroupID.y, g = h / (pc.n_heads / pc.n_kv_heads);
    const uint quads = pc.head_dim / 4u, parts = (quads + QUADS - 1u) / QUADS; // parts of the head
    const uint item = (gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x) >> 3;  // one for every eight lanes
    const uint lane = gl_SubgroupInvocationID & 7u, first = gl_SubgroupInvocationID & ~7u;
    const uint row0 = (pc.group0 + item / parts) * ATTENTION_ALL_UNIT + lane, quad0 = item % parts * QUADS;
    if (item < pc.groups * parts) {
        uint row[TOKENS];
        [[unroll]] for (uint a = 0; a < TOKENS; a++) {
            row[a] = (h * pc.p_rows + min(row0 + 8u * a, pc.p_rows - 1u)) * (pc.p_cols / 4u);
        }
        float acc[QUADS * 4 * TOKENS];
        [[unroll]] for (uint i = 0; i < QUADS * 4u * TOKENS; i++) {
            acc[i] = 0.0;
        }
        const uint mine = min(quad0 + min(lane, QUADS - 1u), quads - 1u);
        [[dont_unroll]] for (uint j = 0; j < pc.kv_rows; j += 4u) {
            vec4 w[TOKENS], v[4];
            [[unroll]] for (uint a = 0; a < TOKENS; a++) {
                w[a] = texelFetch(p4, int(row[a] + j / 4u));
            }
            [[unroll]] for (uint i = 0; i < 4u; i++) {
                v[i] = texelFetch(v4, int(((j + i) * pc.n_kv_heads + g) * quads + mine));
            }
            [[unroll]] for (uint d = 0; d < QUADS * 4u; d++) {
                [[unroll]] for (uint i = 0; i < 4u; i++) {
                    const float value = subgroupShuffle(v[i][d & 3u], first | d >> 2);
                    [[unroll]] for (uint a = 0; a < TOKENS; a++) {
                        acc[d * TOKENS + a] += w[a][i] * value;
                    }
                }
            }
        }
        [[unroll]] for (uint a = 0; a < TOKENS; a++) {
            if (row0 + 8u * a < pc.p_rows) {
                const uint at = ((pc.t0 + row0 + 8u * a) * pc.n_heads + h) * pc.head_dim + quad0 * 4u;
                [[unroll]] for (uint d = 0; d < QUADS * 4u; d++) {
                    if (quad0 * 4u + d < pc.head_dim) {
                        o[at + d] = acc[d * TOKENS + a];
                    }
                }
            }
        }
    }
}
