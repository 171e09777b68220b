// SPDX-License-Identifier: MIT
// top_put: writes the list's values to their places in each row. Workgroup = row, lane = place in the list.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "xent/top.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { top_pc pc; };
layout(set = 0, binding = 0) restrict buffer Logits { float logits[]; };      // [C, V]
layout(set = 0, binding = 1) restrict readonly buffer Ids { uint ids[]; };    // [C, TOP]
layout(set = 0, binding = 2) restrict readonly buffer Top { float top[]; };   // [C, TOP]

void main()
{
    const uint row = gl_WorkGroupID.x, k = gl_LocalInvocationID.x;
    if (k < pc.n_top) {
        logits[row * pc.vocab + ids[row * TOP + k]] = top[row * TOP + k];
    }
}
