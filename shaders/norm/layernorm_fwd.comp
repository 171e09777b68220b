// SPDX-License-Identifier: MIT
// layernorm_fwd: y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · w + b, one row a workgroup.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "norm/norm.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { norm_pc pc; };
layout(set = 0, binding = 0) readonly buffer X { float x[]; };          // [T, D], may be y
layout(set = 0, binding = 1) restrict readonly buffer W { float w[]; }; // [D]
layout(set = 0, binding = 2) restrict readonly buffer B { float b[]; }; // [D]
layout(set = 0, binding = 3) buffer Y { float y[]; };                   // [T, D]

#include "common/reduce.glsl"

void main()
{
    const uint row = (gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x) * pc.width;
    const float n = float(pc.width);
    float sum = 0.0, sq = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        sum += x[row + i];
    }
    const float mean = reduce_sum(sum, false) / n;
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        const float c = x[row + i] - mean;
        sq += c * c;
    }
    const float r = 1.0 / sqrt(reduce_sum(sq, true) / n + pc.eps);
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        y[row + i] = (x[row + i] - mean) * r * w[i] + b[i];
    }
}
