// SPDX-License-Identifier: MIT
// lora_outer: M += scale · zᵀ h, summed over tokens in order: the gradient of an adapter matrix. Lane = element of the wide side.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "common/exchange.glsl"
#include "lora/lora.h"

layout(local_size_x_id = 0) in; // 64
const uint COLS = 8;            // ranks a lane works on

layout(push_constant) uniform Push { lora_pc pc; };
OPERAND(0, z) // [T, wide]
OPERAND(1, h) // [T, r]
layout(set = 0, binding = 2) restrict buffer M { float m[]; };

void main()
{
    const uint n = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    const uint c0 = gl_WorkGroupID.y * COLS;
    const uint nn = min(n, pc.wide - 1u);

    float acc[COLS];
    [[unroll]] for (uint i = 0; i < COLS; i++) {
        acc[i] = 0.0;
    }
    [[dont_unroll]] for (uint t = 0; t < pc.n_tokens; t++) {
        const float zv = z(t * pc.wide + nn);
        EIGHT(hv, 1);
        FILL_EIGHT(hv, 0u, I, h(t * pc.rank + min(c0 + I, pc.rank - 1u)))
#define MAC(i) acc[i] += zv * PICK_EIGHT(hv, 0u, i);
        EACH_EIGHT(MAC)
    }
    if (n < pc.wide) {
        [[unroll]] for (uint i = 0; i < COLS; i++) {
            if (c0 + i < pc.rank) {
                m[n * pc.s_wide + (c0 + i) * pc.s_rank] += pc.scale * acc[i];
            }
        }
    }
}
