// SPDX-License-Identifier: MIT
// xent_bwd: logits[i, v] = weight[i] · (softmax(logits[i])[v] - [v = target[i]]), in place.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "xent/xent.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { xent_pc pc; };
layout(set = 0, binding = 0) restrict buffer Logits { float logits[]; };            // [C, V]
layout(set = 0, binding = 1) restrict readonly buffer Targets { uint targets[]; };  // [C]
layout(set = 0, binding = 2) restrict readonly buffer Stats { vec4 stats[]; };      // [C]
layout(set = 0, binding = 3) restrict readonly buffer Weights { float weight[]; };  // [C]

void main()
{
    const uint row = gl_WorkGroupID.y;
    const uint begin = gl_WorkGroupID.x * XENT_SEGMENT;
    const uint end = min(begin + XENT_SEGMENT, pc.vocab);
    const uint at = row * pc.vocab;
    const float lse = stats[row].y, w = weight[row];
    const uint target = targets[row];
    for (uint i = begin + gl_LocalInvocationID.x; i < end; i += 64u) {
        logits[at + i] = w * (exp(logits[at + i] - lse) - (i == target ? 1.0 : 0.0));
    }
}
