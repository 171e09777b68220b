// SPDX-License-Identifier: MIT
// xent_partial: for one segment of a row of logits: maximum m, Σ exp(l - m), Σ exp(l - m) · (l - m). Logits relative to the
// maximum, so that the entropy of a row does not depend on how large its logits are.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "xent/xent.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { xent_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer Logits { float logits[]; };      // [C, V]
layout(set = 0, binding = 1) restrict writeonly buffer Partial { vec4 partial[]; };    // [C, segments]

#include "common/reduce.glsl"

void main()
{
    const uint row = gl_WorkGroupID.y;
    const uint begin = gl_WorkGroupID.x * XENT_SEGMENT;
    const uint end = min(begin + XENT_SEGMENT, pc.vocab);
    const uint at = row * pc.vocab;
    float best = -3.402823e38;
    for (uint i = begin + gl_LocalInvocationID.x; i < end; i += gl_WorkGroupSize.x) {
        best = max(best, logits[at + i]);
    }
    best = reduce_max(best, false);
    float sum = 0.0, first = 0.0;
    for (uint i = begin + gl_LocalInvocationID.x; i < end; i += gl_WorkGroupSize.x) {
        const float x = logits[at + i] - best;
        const float e = exp(x);
        sum += e;
        first += e * x;
    }
    sum = reduce_sum(sum, true);
    first = reduce_sum(first, true);
    if (gl_LocalInvocationID.x == 0u) {
        partial[row * pc.segments + gl_WorkGroupID.x] = vec4(best, sum, first, 0.0);
    }
}
