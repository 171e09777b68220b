// SPDX-License-Identifier: MIT
// rmsnorm_bwd: dx = r·w·dy - x·(r³/D)·Σ(x·w·dy) with r = 1/sqrt(mean(x²) + eps), one row a workgroup.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "norm/norm.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { norm_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; }; // [T, D]
layout(set = 0, binding = 1) restrict readonly buffer W { float w[]; }; // [D]
layout(set = 0, binding = 2) readonly buffer DY { float dy[]; };        // [T, D], may be dx
layout(set = 0, binding = 3) buffer DX { float dx[]; };                 // [T, D]

#include "common/reduce.glsl"

void main()
{
    const uint row = (gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x) * pc.width;
    float sq = 0.0, dot = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        const float xv = x[row + i];
        sq += xv * xv;
        dot += xv * w[i] * dy[row + i];
    }
    const float n = float(pc.width);
    const float r = 1.0 / sqrt(reduce_sum(sq, false) / n + pc.eps);
    const float c = r * r * r / n * reduce_sum(dot, true);
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        const float v = r * w[i] * dy[row + i] - x[row + i] * c;
        dx[row + i] = pc.flag != 0u ? dx[row + i] + v : v;
    }
}
