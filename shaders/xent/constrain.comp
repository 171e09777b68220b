// SPDX-License-Identifier: MIT
// constrain: weight[i] *= max(2 (1 - σ(β (log π - log π0))), 1e-3), with log π of the row's target. Lane = row.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "xent/xent.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { xent_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer Stats { vec4 stats[]; };  // [C] as xent_combine left them
layout(set = 0, binding = 1) restrict readonly buffer Beta { float beta[]; };   // [C]
layout(set = 0, binding = 2) restrict readonly buffer Base { float log_0[]; };  // [C]
layout(set = 0, binding = 3) restrict buffer Weights { float weight[]; };       // [C]

void main()
{
    const uint row = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    if (row < pc.n_rows) {
        const float ratio = stats[row].z - stats[row].y - log_0[row];
        // exp() may overflow to infinity: the weight then is the least one
        weight[row] *= max(2.0 / (1.0 + exp(beta[row] * ratio)), 1e-3);
    }
}
