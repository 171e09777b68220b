// SPDX-License-Identifier: MIT
// lora_expand: y [T, wide] += scale · h [T, r] Mᵀ. Lane = element of the wide side, or with LORA_FOUR_WIDE four of them.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "common/exchange.glsl"
#include "lora/lora.h"

layout(local_size_x_id = 0) in;                // 64, less for narrow matrices
layout(constant_id = 1) const uint TOKENS = 1; // tokens a lane works on, at most 8
layout(constant_id = 2) const uint FOUR = 0;   // lora.h; not LORA_ONE only where the rank is a multiple of four, for h

layout(push_constant) uniform Push { lora_pc pc; };
OPERAND(0, h) // [T, r]
OPERAND(1, m)
layout(set = 0, binding = 2) restrict buffer Y { float y[]; };          // [T, wide]

const uint EACH = FOUR == LORA_FOUR_WIDE ? 4 : 1; // elements of the wide side a lane works on

void main()
{
    const uint n = (gl_WorkGroupID.x * gl_WorkGroupSize.x + gl_LocalInvocationID.x) * EACH;
    const uint t0 = gl_WorkGroupID.y * TOKENS;
    const uint at = min(n, pc.wide - EACH) * pc.s_wide;

    float acc[TOKENS * EACH];
    [[unroll]] for (uint i = 0; i < TOKENS * EACH; i++) {
        acc[i] = 0.0;
    }
    if (FOUR == LORA_ONE) {
        uint row[TOKENS];
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            row[t] = min(t0 + t, pc.n_tokens - 1u) * pc.rank;
        }
        [[dont_unroll]] for (uint c = 0; c < pc.rank; c += 8u) {
            EIGHT(hv, TOKENS);
            [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                FILL_EIGHT(hv, t, I, h(row[t] + c + min(I, pc.rank - 1u - c)))
            }
#define MAC(i) \
    { \
        const float mv = c + i < pc.rank ? m(at + min(c + i, pc.rank - 1u) * pc.s_rank) : 0.0; \
        [[unroll]] for (uint t = 0; t < TOKENS; t++) { \
            acc[t] += PICK_EIGHT(hv, t, i) * mv; \
        } \
    }
            EACH_EIGHT(MAC)
        }
    } else {
        [[dont_unroll]] for (uint c = 0; c < pc.rank; c += 4u) {
            FOURS(hv); // vector t: token t0 + t, four ranks
            FILL_FOURS(hv, I, h_four(min(t0 + I, pc.n_tokens - 1u) * pc.rank + c))
            if (FOUR == LORA_FOUR_WIDE) {
                [[unroll]] for (uint j = 0; j < 4u; j++) {
                    const vec4 mv = m_four(at + (c + j) * pc.s_rank);
                    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                        const float hj = PICK_FOUR(hv, t, j);
                        [[unroll]] for (uint e = 0; e < EACH; e++) {
                            acc[t * EACH + e] += hj * mv[e];
                        }
                    }
                }
            } else {
                vec4 mv;
                if (FOUR == LORA_FOUR_RANK) {
                    mv = m_four(at + c);
                } else {
                    [[unroll]] for (uint j = 0; j < 4u; j++) {
                        mv[j] = m(at + (c + j) * pc.s_rank);
                    }
                }
                [[unroll]] for (uint j = 0; j < 4u; j++) {
                    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                        acc[t] += PICK_FOUR(hv, t, j) * mv[j];
                    }
                }
            }
        }
    }
    if (n < pc.wide) {
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            if (t0 + t < pc.n_tokens) {
                [[unroll]] for (uint e = 0; e < EACH; e++) {
                    y[(t0 + t) * pc.wide + n + e] += pc.scale * acc[t * EACH + e];
                }
            }
        }
    }
}
