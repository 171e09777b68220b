// SPDX-License-Identifier: MIT
// gelu: y = gelu(x).
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "ewise/ewise.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { ewise_pc pc; };
layout(set = 0, binding = 0) readonly buffer X { float x[]; }; // may be y
layout(set = 0, binding = 1) writeonly buffer Y { float y[]; };

#include "ewise/gelu.glsl"

void main()
{
    const uint i = (gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x) * 64u + gl_LocalInvocationID.x;
    if (i < pc.n) {
        y[i] = gelu(x[i]);
    }
}
