// SPDX-License-Identifier: MIT
// attn_scores_all: P[h, t, j] = scale · q[t, h, :] · k[j, g, :] where every token sees every key and the head is a multiple of
// eight wide: patches of an image. Only with EXCHANGE, for CPU drivers. Lane = KEYS keys; 16 tokens share them.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_shader_subgroup_shuffle : require
#include "attention/attention.h"

layout(local_size_x_id = 0) in; // 64
const uint TOKENS = ATTENTION_ALL_TOKENS, KEYS = ATTENTION_ALL_KEYS;

layout(push_constant) uniform Push { attention_pc pc; };
layout(set = 0, binding = 0) uniform samplerBuffer q4; // [T, H, d / 4] of vec4
layout(set = 0, binding = 1) uniform samplerBuffer k4; // [R, G, d / 4] of vec4
layout(set = 0, binding = 2) restrict writeonly buffer P { float p[]; };

void main()
{
    const uint h = gl_WorkGroupID.z, g = h / (pc.n_heads / pc.n_kv_heads);
    const uint row0 = (pc.group0 + gl_WorkGroupID.y) * TOKENS;
    const uint lane = gl_SubgroupInvocationID & 7u, first = gl_SubgroupInvocationID & ~7u; // of the eight that share
    const uint quads = pc.head_dim / 4u;
    const uint j0 = gl_WorkGroupID.x * 64u * KEYS + gl_LocalInvocationID.x;

    uint key[KEYS], row[TOKENS / 4];
    [[unroll]] for (uint a = 0; a < KEYS; a++) {
        key[a] = (min(j0 + 64u * a, pc.kv_rows - 1u) * pc.n_kv_heads + g) * quads;
    }
    [[unroll]] for (uint i = 0; i < TOKENS / 4u; i++) { // a lane reads one quad of every second lane's token
        row[i] = (min(pc.t0 + row0 + 4u * i + (lane >> 1), pc.n_tokens - 1u) * pc.n_heads + h) * quads + (lane & 1u);
    }
    float acc[TOKENS * KEYS];
    [[unroll]] for (uint i = 0; i < TOKENS * KEYS; i++) {
        acc[i] = 0.0;
    }
    [[dont_unroll]] for (uint d = 0; d < quads; d += 2u) {
        vec4 mine[TOKENS / 4], k[2 * KEYS];
        [[unroll]] for (uint i = 0; i < TOKENS / 4u; i++) {
            mine[i] = texelFetch(q4, int(row[i] + d));
        }
        [[unroll]] for (uint a = 0; a < 2u * KEYS; a++) {
            k[a] = texelFetch(k4, int(key[a >> 1] + d + (a & 1u)));
        }
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            [[unroll]] for (uint e = 0; e < 8u; e++) {
                const float q = subgroupShuffle(mine[t >> 2][e & 3u], first | (t & 3u) << 1 | e >> 2);
                [[unroll]] for (uint a = 0; a < KEYS; a++) {
                    acc[t * KEYS + a] += q * k[2u * a + (e >> 2)][e & 3u];
                }
            }
        }
    }
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        [[unroll]] for (uint a = 0; a < KEYS; a++) {
            if (row0 + t < pc.p_rows && j0 + 64u * a < pc.kv_rows) {
                p[(h * pc.p_rows + row0 + t) * pc.p_cols + j0 + 64u * a] = pc.scale * acc[t * KEYS + a];
            }
        }
    }
}
