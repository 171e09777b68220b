// SPDX-License-Identifier: MIT
// geglu_bwd: d_gate = dy · up · gelu'(gate), d_up = dy · gelu(gate).
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "ewise/ewise.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { ewise_pc pc; };
layout(set = 0, binding = 0) readonly buffer Gate { float gate[]; };     // may be d_gate
layout(set = 0, binding = 1) readonly buffer Up { float up[]; };         // may be d_up
layout(set = 0, binding = 2) restrict readonly buffer DY { float dy[]; };
layout(set = 0, binding = 3) writeonly buffer DGate { float d_gate[]; };
layout(set = 0, binding = 4) writeonly buffer DUp { float d_up[]; };

#include "ewise/gelu.glsl"

void main()
{
    const uint i = (gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x) * 64u + gl_LocalInvocationID.x;
    if (i < pc.n) {
        const float g = gate[i], u = up[i], d = dy[i];
        d_gate[i] = d * u * gelu_grad(g);
        d_up[i] = d * gelu(g);
    }
}
