// SPDX-License-Identifier: MIT
// kl_combine: joins the segments of each row. Lane = row. Rounding may leave a sum a little below zero: it is cut to zero.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "xent/xent.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { xent_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer Partial { vec4 partial[]; }; // [C, segments]
layout(set = 0, binding = 1) restrict writeonly buffer KL { vec2 kl[]; };          // [C]

void main()
{
    const uint row = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    if (row < pc.n_rows) {
        vec2 sum = vec2(0.0);
        for (uint s = 0; s < pc.segments; s++) {
            sum += partial[row * pc.segments + s].xy;
        }
        // max() would turn NaN into 0 and hide a broken row
        kl[row] = vec2(sum.x < 0.0 ? 0.0 : sum.x, sum.y < 0.0 ? 0.0 : sum.y);
    }
}
