// SPDX-License-Identifier: MIT
// heads_bwd: turns the gradient back, then RMSNorm's backward over the head. One head a workgroup.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rope/heads.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { heads_bwd_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };      // [T, H, d]
layout(set = 0, binding = 1) restrict readonly buffer W { float w[]; };      // [d]
layout(set = 0, binding = 2) restrict readonly buffer Rope { vec2 rope[]; }; // [T, d/2] cos, sin
layout(set = 0, binding = 3) readonly buffer DY { float dy[]; };             // [T, H, d], may be dx
layout(set = 0, binding = 4) buffer DX { float dx[]; };                      // [T, H, d]

#include "common/reduce.glsl"

void main()
{
    const uint t = gl_WorkGroupID.y;
    const uint d = pc.head_dim, half_d = d / 2u;
    const uint at = (t * pc.n_heads + gl_WorkGroupID.x) * d;
    float sq = 0.0, dot = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < half_d; i += gl_WorkGroupSize.x) {
        const vec2 cs = rope[t * half_d + i];
        const float ga = dy[at + i], gb = dy[at + i + half_d];
        const float xa = x[at + i], xb = x[at + i + half_d];
        sq += xa * xa + xb * xb;
        dot += xa * w[i] * (ga * cs.x + gb * cs.y) + xb * w[i + half_d] * (gb * cs.x - ga * cs.y);
    }
    const float r = 1.0 / sqrt(reduce_sum(sq, false) / float(d) + pc.eps);
    const float c = r * r * r / float(d) * reduce_sum(dot, true);
    for (uint i = gl_LocalInvocationID.x; i < half_d; i += gl_WorkGroupSize.x) {
        const vec2 cs = rope[t * half_d + i];
        const float ga = dy[at + i], gb = dy[at + i + half_d];
        dx[at + i] = r * w[i] * (ga * cs.x + gb * cs.y) - x[at + i] * c;
        dx[at + i + half_d] = r * w[i + half_d] * (gb * cs.x - ga * cs.y) - x[at + i + half_d] * c;
    }
}
