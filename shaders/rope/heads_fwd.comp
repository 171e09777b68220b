// SPDX-License-Identifier: MIT
// heads_fwd: RMSNorm of each head, rotation by position, store into the cache row of the token. One head a workgroup.
// Rotation: Su et al. 2021, pairs (i, i + d/2) as in GPT-NeoX.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rope/heads.h"

layout(local_size_x_id = 0) in;                // 64
layout(constant_id = 1) const bool NORM = true; // false: plain copy (values)

layout(push_constant) uniform Push { heads_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };         // [T, H, d]
layout(set = 0, binding = 1) restrict readonly buffer W { float w[]; };         // [d]
layout(set = 0, binding = 2) restrict readonly buffer Rope { vec2 rope[]; };    // [T, d/2] cos, sin
layout(set = 0, binding = 3) restrict readonly buffer Spans { uint spans[]; };  // [T] of 8 words
layout(set = 0, binding = 4) restrict writeonly buffer Y { float y[]; };        // [rows, H, d]

#include "common/reduce.glsl"

void main()
{
    const uint t = gl_WorkGroupID.y, h = gl_WorkGroupID.x;
    const uint d = pc.head_dim, half_d = d / 2u;
    const uint from = (t * pc.n_heads + h) * d;
    const uint to_row = pc.use_slot != 0u ? spans[t * 8u + 2u] % pc.y_rows : t;
    const uint to = (to_row * pc.n_heads + h) * d;
    if (NORM) {
        float sum = 0.0;
        for (uint i = gl_LocalInvocationID.x; i < d; i += 64u) {
            sum += x[from + i] * x[from + i];
        }
        const float r = 1.0 / sqrt(reduce_sum(sum, false) / float(d) + pc.eps);
        for (uint i = gl_LocalInvocationID.x; i < half_d; i += 64u) {
            const float a = x[from + i] * r * w[i];
            const float b = x[from + i + half_d] * r * w[i + half_d];
            const vec2 cs = rope[t * half_d + i];
            y[to + i] = a * cs.x - b * cs.y;
            y[to + i + half_d] = b * cs.x + a * cs.y;
        }
    } else {
        for (uint i = gl_LocalInvocationID.x; i < d; i += 64u) {
            y[to + i] = x[from + i];
        }
    }
}
