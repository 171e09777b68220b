// SPDX-License-Identifier: MIT
// rows_dot: y[t, i] = x[t] · u[i], or with SQUARE y[t] = x[t] · x[t]. One product a workgroup.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rows/rows.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl
layout(constant_id = 1) const bool SQUARE = false;

layout(push_constant) uniform Push { rows_pc pc; };
layout(set = 0, binding = 0) readonly buffer X { float x[]; };              // [T, D]
layout(set = 0, binding = 1) readonly buffer U { float u[]; };              // [k, D]; SQUARE: not read
layout(set = 0, binding = 2) restrict writeonly buffer Y { float y[]; };    // [T, k]

#include "common/reduce.glsl"

void main()
{
    const uint i = gl_WorkGroupID.x, t = gl_WorkGroupID.y, row = t * pc.width;
    float sum = 0.0;
    for (uint c = gl_LocalInvocationID.x; c < pc.width; c += gl_WorkGroupSize.x) {
        sum += x[row + c] * (SQUARE ? x[row + c] : u[i * pc.width + c]);
    }
    sum = reduce_sum(sum, false);
    if (gl_LocalInvocationID.x == 0u) {
        y[t * pc.k + i] = sum;
    }
}
