// SPDX-License-Identifier: MIT
// attn_softmax: softmax of each row of P in place. One row a workgroup.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "attention/attention.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { attention_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer Spans { uint spans[]; };
layout(set = 0, binding = 1) restrict buffer P { float p[]; };

#include "common/reduce.glsl"

void main()
{
    const uint row = gl_WorkGroupID.x, h = gl_WorkGroupID.y;
    const uint t = pc.t0 + row;
    const uint n = spans[t * 8u + 1u] - spans[t * 8u];
    const uint at = (h * pc.p_rows + row) * pc.p_cols;
    float best = -3.402823e38;
    for (uint i = gl_LocalInvocationID.x; i < n; i += gl_WorkGroupSize.x) {
        best = max(best, p[at + i]);
    }
    best = reduce_max(best, false);
    float sum = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < n; i += gl_WorkGroupSize.x) {
        const float e = exp(p[at + i] - best);
        p[at + i] = e;
        sum += e;
    }
    const float inv = 1.0 / reduce_sum(sum, true);
    for (uint i = gl_LocalInvocationID.x; i < n; i += gl_WorkGroupSize.x) {
        p[at + i] *= inv;
    }
}
