// SPDX-License-Identifier: MIT
// rows_pool: y[r] = sum of mark · x over the rows [begin, end) of segment r. A workgroup takes 64 columns of one segment.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rows/rows.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { rows_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };          // [T, D]
layout(set = 0, binding = 1) restrict readonly buffer Marks { float marks[]; };  // [T]
layout(set = 0, binding = 2) restrict readonly buffer Segments { uint seg[]; };  // [R, 2]
layout(set = 0, binding = 3) restrict writeonly buffer Y { float y[]; };         // [R, D]

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x, r = gl_WorkGroupID.y;
    if (c >= pc.width) {
        return;
    }
    float sum = 0.0;
    for (uint t = seg[2u * r]; t < seg[2u * r + 1u]; t++) {
        sum += marks[t] * x[t * pc.width + c];
    }
    y[r * pc.width + c] = sum;
}
