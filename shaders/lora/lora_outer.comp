// SPDX-License-Identifier: MIT
// lora_outer: M += scale · zᵀ h, summed over tokens in order: the gradient of an adapter matrix. Lane = element of the wide side and
// eight ranks, or with FOUR four elements and four ranks.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "common/exchange.glsl"
#include "lora/lora.h"

layout(local_size_x_id = 0) in;                  // 64, less for narrow matrices
layout(constant_id = 1) const bool FOUR = false; // only where wide and rank are multiples of four
const uint EACH = FOUR ? 4 : 1, COLS = FOUR ? 4 : 8;

layout(push_constant) uniform Push { lora_pc pc; };
OPERAND(0, z) // [T, wide]
OPERAND(1, h) // [T, r]
layout(set = 0, binding = 2) restrict buffer M { float m[]; };

void main()
{
    const uint n = (gl_WorkGroupID.x * gl_WorkGroupSize.x + gl_LocalInvocationID.x) * EACH;
    const uint c0 = gl_WorkGroupID.y * COLS;
    const uint nn = min(n, pc.wide - EACH);

    float acc[COLS * EACH];
    [[unroll]] for (uint i = 0; i < COLS * EACH; i++) {
        acc[i] = 0.0;
    }
    if (FOUR) {
        [[dont_unroll]] for (uint t = 0; t < pc.n_tokens; t += 8u) {
            FOURS(hv); // vector i: token t + i, or zeros beyond the last
            FILL_FOURS(hv, I, t + I < pc.n_tokens ? h_four(min(t + I, pc.n_tokens - 1u) * pc.rank + c0) : vec4(0.0))
            [[unroll]] for (uint i = 0; i < 8u; i++) {
                const vec4 zv = z_four(min(t + i, pc.n_tokens - 1u) * pc.wide + nn);
                [[unroll]] for (uint c = 0; c < COLS; c++) {
                    const float hc = PICK_FOUR(hv, i, c);
                    [[unroll]] for (uint e = 0; e < EACH; e++) {
                        acc[c * EACH + e] += zv[e] * hc;
                    }
                }
            }
        }
    } else {
        [[dont_unroll]] for (uint t = 0; t < pc.n_tokens; t++) {
            const float zv = z(t * pc.wide + nn);
            EIGHT(hv, 1);
            FILL_EIGHT(hv, 0u, I, h(t * pc.rank + min(c0 + I, pc.rank - 1u)))
#define MAC(i) acc[i] += zv * PICK_EIGHT(hv, 0u, i);
            EACH_EIGHT(MAC)
        }
    }
    if (n < pc.wide) {
        [[unroll]] for (uint c = 0; c < COLS; c++) {
            [[unroll]] for (uint e = 0; e < EACH; e++) {
                if (c0 + c < pc.rank) {
                    m[(n + e) * pc.s_wide + (c0 + c) * pc.s_rank] += pc.scale * acc[c * EACH + e];
                }
            }
        }
    }
}
