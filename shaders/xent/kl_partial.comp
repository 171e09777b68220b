// SPDX-License-Identifier: MIT
// kl_partial: for one segment of a row: Σ p·(log p - log q) and Σ q·(log q - log p).
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "xent/xent.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { xent_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer LogitsP { float lp[]; };      // [C, V]
layout(set = 0, binding = 1) restrict readonly buffer LogitsQ { float lq[]; };      // [C, V]
layout(set = 0, binding = 2) restrict readonly buffer StatsP { vec4 stats_p[]; };   // [C]
layout(set = 0, binding = 3) restrict readonly buffer StatsQ { vec4 stats_q[]; };   // [C]
layout(set = 0, binding = 4) restrict writeonly buffer Partial { vec4 partial[]; }; // [C, segments]

#include "common/reduce.glsl"

void main()
{
    const uint row = gl_WorkGroupID.y;
    const uint begin = gl_WorkGroupID.x * XENT_SEGMENT;
    const uint end = min(begin + XENT_SEGMENT, pc.vocab);
    const uint at = row * pc.vocab;
    const float zp = stats_p[row].y, zq = stats_q[row].y;
    float forward = 0.0, reverse = 0.0;
    for (uint i = begin + gl_LocalInvocationID.x; i < end; i += gl_WorkGroupSize.x) {
        const float a = lp[at + i] - zp, b = lq[at + i] - zq;
        forward += exp(a) * (a - b);
        reverse += exp(b) * (b - a);
    }
    forward = reduce_sum(forward, false);
    reverse = reduce_sum(reverse, true);
    if (gl_LocalInvocationID.x == 0u) {
        partial[row * pc.segments + gl_WorkGroupID.x] = vec4(forward, reverse, 0.0, 0.0);
    }
}
