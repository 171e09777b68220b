// SPDX-License-Identifier: MIT
// sumsq: sum of squares (SQUARE) of one segment, or plain sum of the partial sums. The order of addition is fixed.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "adamw/adamw.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl
layout(constant_id = 1) const bool SQUARE = true;

layout(push_constant) uniform Push { sumsq_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };
layout(set = 0, binding = 1) restrict writeonly buffer Sums { float sums[]; }; // one a workgroup

#include "common/reduce.glsl"

void main()
{
    const uint begin = SQUARE ? gl_WorkGroupID.x * SUMSQ_SEGMENT : 0u;
    const uint end = SQUARE ? min(begin + SUMSQ_SEGMENT, pc.n) : pc.n;
    float sum = 0.0;
    for (uint i = begin + gl_LocalInvocationID.x; i < end; i += gl_WorkGroupSize.x) {
        sum += SQUARE ? x[i] * x[i] : x[i];
    }
    sum = reduce_sum(sum, false);
    if (gl_LocalInvocationID.x == 0u) {
        sums[gl_WorkGroupID.x] = sum;
    }
}
