// SPDX-License-Identifier: MIT
// lora_expand: y [T, wide] += scale · h [T, r] Mᵀ. Lane = element of the wide side.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "common/exchange.glsl"
#include "lora/lora.h"

layout(local_size_x_id = 0) in;                // 64
layout(constant_id = 1) const uint TOKENS = 1; // tokens a lane works on

layout(push_constant) uniform Push { lora_pc pc; };
OPERAND(0, h) // [T, r]
OPERAND(1, m)
layout(set = 0, binding = 2) restrict buffer Y { float y[]; };          // [T, wide]

void main()
{
    const uint n = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    const uint t0 = gl_WorkGroupID.y * TOKENS;
    const uint at = min(n, pc.wide - 1u) * pc.s_wide;

    uint row[TOKENS];
    float acc[TOKENS];
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        row[t] = min(t0 + t, pc.n_tokens - 1u) * pc.rank;
        acc[t] = 0.0;
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
    if (n < pc.wide) {
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            if (t0 + t < pc.n_tokens) {
                y[(t0 + t) * pc.wide + n] += pc.scale * acc[t];
            }
        }
    }
}
