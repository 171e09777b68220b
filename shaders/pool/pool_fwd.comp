// SPDX-License-Identifier: MIT
// pool_fwd: y[j] = mean of the rows of x in square j of a grid. A workgroup takes 64 columns of one square.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "pool/pool.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { pool_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };  // [grid², D]
layout(set = 0, binding = 1) restrict writeonly buffer Y { float y[]; }; // [side², D]

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x, j = gl_WorkGroupID.y;
    if (c < pc.width) {
        const uint first = j / pc.side * pc.kernel * pc.grid + j % pc.side * pc.kernel;
        float sum = 0.0;
        for (uint row = 0; row < pc.kernel; row++) {
            for (uint col = 0; col < pc.kernel; col++) {
                sum += x[(first + row * pc.grid + col) * pc.width + c];
            }
        }
        y[j * pc.width + c] = sum / float(pc.kernel * pc.kernel);
    }
}
