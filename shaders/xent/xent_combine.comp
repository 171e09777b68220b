// SPDX-License-Identifier: MIT
// xent_combine: joins the segments of each row: maximum, log-sum-exp, logit of the target, entropy. Lane = row.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "xent/xent.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { xent_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer Logits { float logits[]; };   // [C, V]
layout(set = 0, binding = 1) restrict readonly buffer Targets { uint targets[]; };  // [C]
layout(set = 0, binding = 2) restrict readonly buffer Partial { vec4 partial[]; };  // [C, segments]
layout(set = 0, binding = 3) restrict writeonly buffer Stats { vec4 stats[]; };     // [C]

void main()
{
    const uint row = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    if (row < pc.n_rows) {
        float best = -3.402823e38;
        for (uint s = 0; s < pc.segments; s++) {
            best = max(best, partial[row * pc.segments + s].x);
        }
        float sum = 0.0, first = 0.0;
        for (uint s = 0; s < pc.segments; s++) {
            const vec4 part = partial[row * pc.segments + s];
            const float x = part.x - best, e = exp(x);
            sum += part.y * e;
            first += (part.z + part.y * x) * e;
        }
        // sum >= 1 and first <= 0: the entropy cannot come out below zero
        const float log_sum = log(sum);
        stats[row] = vec4(best, best + log_sum, logits[row * pc.vocab + targets[row]], log_sum - first / sum);
    }
}
