// SPDX-License-Identifier: MIT
// rows_project: takes components along k orthonormal directions out of rows, one row a workgroup, one direction after the
// other. MODE ROWS_ABLATE: x -= mark · (x·u) u. ROWS_CAP and ROWS_FLOOR, k = 1: x -= mark · max(x·u - limit, 0) u, and with min; factor[t]
// then says how much of the component left: mark where the limit was passed, else 0.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rows/rows.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl
layout(constant_id = 1) const uint MODE = ROWS_ABLATE;

layout(push_constant) uniform Push { rows_pc pc; };
layout(set = 0, binding = 0) restrict buffer X { float x[]; };                       // [T, D]
layout(set = 0, binding = 1) restrict readonly buffer U { float u[]; };              // [k, D]
layout(set = 0, binding = 2) readonly buffer Marks { float marks[]; };               // [T]
layout(set = 0, binding = 3) buffer Factor { float factor[]; };                      // [T], ablating: marks, not written

#include "common/reduce.glsl"

void main()
{
    const uint t = gl_WorkGroupID.x, lane = gl_LocalInvocationID.x, row = t * pc.width;
    const float mark = marks[t];
    float left = 0.0;
    if (mark != 0.0) {
        for (uint i = 0; i < pc.k; i++) {
            float dot = 0.0;
            for (uint c = lane; c < pc.width; c += gl_WorkGroupSize.x) {
                dot += x[row + c] * u[i * pc.width + c];
            }
            dot = reduce_sum(dot, i > 0u);
            const float over = MODE == ROWS_ABLATE ? dot : MODE == ROWS_CAP ? max(dot - pc.a, 0.0) : min(dot - pc.a, 0.0);
            left = over != 0.0 ? mark : 0.0;
            for (uint c = lane; c < pc.width && over != 0.0; c += gl_WorkGroupSize.x) {
                x[row + c] -= mark * over * u[i * pc.width + c];
            }
        }
    }
    if (MODE != ROWS_ABLATE && lane == 0u) {
        factor[t] = left;
    }
}
