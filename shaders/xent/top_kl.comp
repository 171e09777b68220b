// SPDX-License-Identifier: MIT
// top_kl: KL(p ‖ q) of the listed elements and the tail as one element, and what its gradient needs. Workgroup = row.
//   stats[row] = {log-sum-exp z of the whole row, tail's log-sum-exp - log p(tail), KL, 0}
//   top[row, k] = weight · (q(k) - p(k))
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "xent/top.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { top_pc pc; };
layout(set = 0, binding = 0) restrict buffer Taken { float top[]; };                // [C, TOP] logits on entry
layout(set = 0, binding = 1) restrict readonly buffer LogP { float log_p[]; };      // [C, TOP]
layout(set = 0, binding = 2) restrict readonly buffer TailP { float tail_log_p[]; };  // [C]
layout(set = 0, binding = 3) restrict readonly buffer Weights { float weight[]; };  // [C]
layout(set = 0, binding = 4) restrict buffer Stats { vec4 stats[]; };               // [C] on entry those of the tail (xent_combine)

#include "common/reduce.glsl"

void main()
{
    const uint row = gl_WorkGroupID.x, k = gl_LocalInvocationID.x, at = row * TOP + k;
    const bool listed = k < pc.n_top;
    const float l = listed ? top[at] : TOP_TAKEN, a = listed ? log_p[at] : 0.0;
    const float tail = stats[row].y, tail_a = tail_log_p[row];
    const float best = max(reduce_max(l, false), tail);
    const float sum = reduce_sum(listed ? exp(l - best) : 0.0, true) + exp(tail - best);
    const float z = best + log(sum);
    const float p = exp(a), tail_p = exp(tail_a);
    const float kl = reduce_sum(listed ? p * (a - (l - z)) : 0.0, true);
    if (listed) {
        top[at] = weight[row] * (exp(l - z) - p);
    }
    if (k == 0u) {
        const float rest = tail_p > 0.0 ? tail_p * (tail_a - (tail - z)) : 0.0; // 0 · log 0 = 0
        const float both = kl + rest;
        stats[row] = vec4(z, tail - tail_a, both < 0.0 ? 0.0 : both, 0.0); // max() would turn NaN into 0
    }
}
