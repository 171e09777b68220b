// SPDX-License-Identifier: MIT
// rows_cov: adds to cov[i, j] the sum over rows of mark · (x[i] - shift[i]) (x[j] - shift[j]). A lane takes four i of one j.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rows/rows.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { rows_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };         // [T, D]
layout(set = 0, binding = 1) restrict readonly buffer Marks { float marks[]; }; // [T]
layout(set = 0, binding = 2) restrict readonly buffer Shift { float shift[]; }; // [D]
layout(set = 0, binding = 3) restrict buffer Cov { float cov[]; };              // [D, D]

void main()
{
    const uint j = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x, i0 = pc.row0 + gl_WorkGroupID.y * 4u;
    if (j >= pc.width) {
        return;
    }
    const uint n = min(4u, pc.width - i0);
    float sum[4] = float[4](0.0, 0.0, 0.0, 0.0);
    for (uint t = 0; t < pc.n_rows; t++) {
        const uint row = t * pc.width;
        const float d = marks[t] * (x[row + j] - shift[j]);
        [[unroll]] for (uint k = 0; k < 4u; k++) {
            const uint i = i0 + min(k, n - 1u);
            sum[k] += d * (x[row + i] - shift[i]);
        }
    }
    [[unroll]] for (uint k = 0; k < 4u; k++) {
        if (k < n) {
            cov[(i0 + k) * pc.width + j] += sum[k];
        }
    }
}
