// SPDX-License-Identifier: MIT
// attn_softmax_bwd: ds = p · (dp - Σ p·dp) row by row, in place of dp. One row a workgroup.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "attention/attention.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { attention_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer Spans { uint spans[]; };
layout(set = 0, binding = 1) restrict readonly buffer P { float p[]; };
layout(set = 0, binding = 2) restrict buffer DS { float ds[]; };

#include "common/reduce.glsl"

void main()
{
    const uint row = gl_WorkGroupID.x;
    const uint t = pc.t0 + row;
    const uint n = spans[t * 8u + 1u] - spans[t * 8u];
    const uint at = (gl_WorkGroupID.y * pc.p_rows + row) * pc.p_cols;
    float dot = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < n; i += gl_WorkGroupSize.x) {
        dot += p[at + i] * ds[at + i];
    }
    dot = reduce_sum(dot, false);
    for (uint i = gl_LocalInvocationID.x; i < n; i += gl_WorkGroupSize.x) {
        ds[at + i] = p[at + i] * (ds[at + i] - dot);
    }
}
