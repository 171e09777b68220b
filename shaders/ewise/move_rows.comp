// SPDX-License-Identifier: MIT
// move_rows: gather (y row i = x row index[i]) or scatter (y row index[i] = x row i).
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "ewise/ewise.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { ewise_pc pc; };
layout(constant_id = 1) const bool SCATTER = false;
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };
layout(set = 0, binding = 1) restrict readonly buffer Index { uint index[]; };
layout(set = 0, binding = 2) restrict writeonly buffer Y { float y[]; };

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    const uint i = gl_WorkGroupID.y;
    if (c < pc.width) {
        const uint other = index[i];
        y[(SCATTER ? other : i) * pc.width + c] = x[(SCATTER ? i : other) * pc.width + c];
    }
}
