// SPDX-License-Identifier: MIT
// bias: y = x + b (+ residual), b the same for every row. A workgroup takes 64 columns of one row.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "ewise/ewise.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { ewise_pc pc; };
layout(constant_id = 1) const bool ADD = false;
layout(set = 0, binding = 0) readonly buffer X { float x[]; };               // [T, N], may be y
layout(set = 0, binding = 1) restrict readonly buffer B { float b[]; };      // [N]
layout(set = 0, binding = 2) readonly buffer Residual { float residual[]; }; // [T, N], may be y
layout(set = 0, binding = 3) writeonly buffer Y { float y[]; };              // [T, N]

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    if (c < pc.width) {
        const uint i = gl_WorkGroupID.y * pc.width + c;
        const float v = x[i] + b[c];
        y[i] = ADD ? residual[i] + v : v;
    }
}
