// SPDX-License-Identifier: MIT
// gelu_bwd: dx = dy · gelu'(x).
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "ewise/ewise.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { ewise_pc pc; };
layout(set = 0, binding = 0) readonly buffer X { float x[]; };   // may be dx
layout(set = 0, binding = 1) readonly buffer DY { float dy[]; }; // may be dx
layout(set = 0, binding = 2) writeonly buffer DX { float dx[]; };

#include "ewise/gelu.glsl"

void main()
{
    const uint i = (gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x) * 64u + gl_LocalInvocationID.x;
    if (i < pc.n) {
        dx[i] = dy[i] * gelu_grad(x[i]);
    }
}
