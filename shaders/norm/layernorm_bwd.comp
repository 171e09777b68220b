// SPDX-License-Identifier: MIT
// layernorm_bwd: dx = r · (g - mean(g) - z · mean(g·z)) with z = (x - mean(x)) · r, g = w · dy; one row a workgroup.
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
    const float n = float(pc.width);
    float sum = 0.0, sum_g = 0.0, sq = 0.0, dot = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        sum += x[row + i];
        sum_g += w[i] * dy[row + i];
    }
    const float mean = reduce_sum(sum, false) / n;
    const float mean_g = reduce_sum(sum_g, true) / n;
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        const float c = x[row + i] - mean;
        sq += c * c;
        dot += w[i] * dy[row + i] * c;
    }
    const float r = 1.0 / sqrt(reduce_sum(sq, true) / n + pc.eps);
    const float k = r * r / n * reduce_sum(dot, true);
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        const float v = r * (w[i] * dy[row + i] - mean_g - (x[row + i] - mean) * k);
        dx[row + i] = pc.flag != 0u ? dx[row + i] + v : v;
    }
}
