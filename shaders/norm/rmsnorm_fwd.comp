// SPDX-License-Identifier: MIT
// rmsnorm_fwd: y = x / sqrt(mean(x²) + eps) · w (+ residual), one row a workgroup.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "norm/norm.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { norm_pc pc; };
layout(set = 0, binding = 0) readonly buffer X { float x[]; };                 // [T, D], may be y
layout(set = 0, binding = 1) restrict readonly buffer W { float w[]; };        // [D]
layout(set = 0, binding = 2) readonly buffer Residual { float residual[]; };   // [T, D], may be y
layout(set = 0, binding = 3) buffer Y { float y[]; };                          // [T, D]

#include "common/reduce.glsl"

void main()
{
    const uint row = (gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x) * pc.width;
    float sum = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        sum += x[row + i] * x[row + i];
    }
    const float r = 1.0 / sqrt(reduce_sum(sum, false) / float(pc.width) + pc.eps);
    for (uint i = gl_LocalInvocationID.x; i < pc.width; i += gl_WorkGroupSize.x) {
        const float v = x[row + i] * r * w[i];
        y[row + i] = pc.flag != 0u ? residual[row + i] + v : v;
    }
}
