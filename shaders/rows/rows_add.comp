// SPDX-License-Identifier: MIT
// rows_add: x[t] += a · mark[t] · v. A workgroup takes 64 columns of one row.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rows/rows.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { rows_pc pc; };
layout(set = 0, binding = 0) restrict buffer X { float x[]; };                  // [T, D]
layout(set = 0, binding = 1) restrict readonly buffer V { float v[]; };         // [D]
layout(set = 0, binding = 2) restrict readonly buffer Marks { float marks[]; }; // [T]

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x, t = gl_WorkGroupID.y;
    const float f = pc.a * marks[t];
    if (c < pc.width && f != 0.0) {
        x[t * pc.width + c] += f * v[c];
    }
}
