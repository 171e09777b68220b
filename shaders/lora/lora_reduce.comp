// SPDX-License-Identifier: MIT
// lora_reduce: h [T, r] = scale · x [T, wide] M, for up to three M. The wide side is summed by SLICES lanes a token.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "common/exchange.glsl"
#include "lora/lora.h"

layout(local_size_x_id = 0) in;                // 64
layout(constant_id = 1) const uint SLICES = 1; // lanes a token: 1 (many tokens) to 64 (one token)
layout(constant_id = 2) const uint FOUR = 0;   // lora.h; not LORA_ONE only where wide is a multiple of four, for x
const uint COLS = 8;                           // ranks a workgroup works on

layout(push_constant) uniform Push { lora_pc pc; };
OPERAND(0, x)  // [T, wide]
OPERAND(1, m)
layout(set = 0, binding = 2) restrict writeonly buffer H { float h[]; }; // [T, r]

shared float part[SLICES > 1 ? 64 * COLS : 1];

void main()
{
    const uint lane = gl_LocalInvocationID.x;
    // As many neighbouring lanes as there are tokens have the same slice, so that they can share values of M if they are a subgroup.
    const uint tokens = 64u / SLICES;
    const uint slice = SLICES == 1 ? 0u : lane / tokens;
    const uint t = gl_WorkGroupID.x * tokens + lane % tokens;
    const uint c0 = gl_WorkGroupID.y * COLS;
    const uint m_at = pc.m_at[gl_WorkGroupID.z], h_at = pc.h_at[gl_WorkGroupID.z];
    const uint row = min(t, pc.n_tokens - 1u) * pc.wide;

    float acc[COLS];
    [[unroll]] for (uint i = 0; i < COLS; i++) {
        acc[i] = 0.0;
    }
    if (FOUR != LORA_ONE) {
        [[dont_unroll]] for (uint k = slice * 4u; k < pc.wide; k += SLICES * 4u) {
            const vec4 xv = x_four(row + k);
            FOURS(mv);
            if (SLICES <= 8 && ONE_SUBGROUP(64u / SLICES)) {
                if (FOUR == LORA_FOUR_WIDE) { // vector i: column c0 + i, four of k
                    FILL_FOURS(mv, I, m_four(m_at + min(c0 + I, pc.rank - 1u) * pc.s_rank + k))
                    [[unroll]] for (uint i = 0; i < COLS; i++) {
                        [[unroll]] for (uint j = 0; j < 4u; j++) {
                            acc[i] += xv[j] * PICK_FOUR(mv, i, j);
                        }
                    }
                } else { // vector 2j + i: k + j, columns c0 + 4i ...
                    FILL_FOURS(mv, I, m_four(m_at + (k + (I >> 1)) * pc.s_wide + min(c0 + (I & 1u) * 4u, pc.rank - 4u)))
                    [[unroll]] for (uint i = 0; i < COLS; i++) {
                        [[unroll]] for (uint j = 0; j < 4u; j++) {
                            acc[i] += xv[j] * PICK_FOUR(mv, 2u * j + (i >> 2), i & 3u);
                        }
                    }
                }
            } else if (FOUR == LORA_FOUR_WIDE) {
                [[unroll]] for (uint i = 0; i < COLS; i++) {
                    acc[i] += dot(xv, m_four(m_at + min(c0 + i, pc.rank - 1u) * pc.s_rank + k));
                }
            } else {
                [[unroll]] for (uint j = 0; j < 4u; j++) {
                    const uint at = m_at + (k + j) * pc.s_wide;
                    const vec4 low = m_four(at + c0), high = m_four(at + min(c0 + 4u, pc.rank - 4u));
                    [[unroll]] for (uint i = 0; i < COLS; i++) {
                        acc[i] += xv[j] * (i < 4u ? low : high)[i & 3u];
                    }
                }
            }
        }
    } else {
        [[dont_unroll]] for (uint k = slice; k < pc.wide; k += SLICES) {
            const float xv = x(row + k);
            EIGHT(mv, 1);
            if (SLICES <= 8 && ONE_SUBGROUP(64u / SLICES)) {
                FILL_EIGHT(mv, 0u, I, m(m_at + k * pc.s_wide + min(c0 + I, pc.rank - 1u) * pc.s_rank))
#define MAC(i) acc[i] += xv * PICK_EIGHT(mv, 0u, i);
                EACH_EIGHT(MAC)
            } else {
                [[unroll]] for (uint i = 0; i < COLS; i++) {
                    acc[i] += xv * m(m_at + k * pc.s_wide + min(c0 + i, pc.rank - 1u) * pc.s_rank);
                }
            }
        }
    }
    if (SLICES > 1) {
        [[unroll]] for (uint i = 0; i < COLS; i++) {
            part[lane * COLS + i] = acc[i];
        }
        barrier();
        // One lane a (token, column): sums that token's slices in order.
        for (uint o = lane; o < tokens * COLS; o += 64u) {
            const uint tt = gl_WorkGroupID.x * tokens + o / COLS, c = c0 + o % COLS;
            float sum = 0.0;
            for (uint i = 0; i < SLICES; i++) {
                sum += part[(i * tokens + o / COLS) * COLS + o % COLS];
            }
            if (tt < pc.n_tokens && c < pc.rank) {
                h[h_at + tt * pc.rank + c] = pc.scale * sum;
            }
        }
    } else if (t < pc.n_tokens) {
        [[unroll]] for (uint i = 0; i < COLS; i++) {
            if (c0 + i < pc.rank) {
                h[h_at + t * pc.rank + c0 + i] = pc.scale * acc[i];
            }
        }
    }
}
