// SPDX-License-Identifier: MIT
// top_bwd: gradient of top_kl's divergence at the tail, in place: logits[i, v] = weight[i] · (q(v) - p(tail) · q(v) / q(tail)), which
// is exp(l - z) - exp(l - (tail's log-sum-exp - log p(tail))): neither term exceeds 1. Listed elements become 0.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "xent/top.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { top_pc pc; };
layout(set = 0, binding = 0) restrict buffer Logits { float logits[]; };           // [C, V]
layout(set = 0, binding = 1) restrict readonly buffer Stats { vec4 stats[]; };     // [C] as top_kl left them
layout(set = 0, binding = 2) restrict readonly buffer Weights { float weight[]; }; // [C]

void main()
{
    const uint row = gl_WorkGroupID.y;
    const uint begin = gl_WorkGroupID.x * XENT_SEGMENT;
    const uint end = min(begin + XENT_SEGMENT, pc.vocab);
    const uint at = row * pc.vocab;
    const float z = stats[row].x, shift = stats[row].y, w = weight[row];
    for (uint i = begin + gl_LocalInvocationID.x; i < end; i += 64u) {
        const float l = logits[at + i];
        logits[at + i] = l == TOP_TAKEN ? 0.0 : w * (exp(l - z) - exp(l - shift));
    }
}
