// SPDX-License-Identifier: MIT
// adamw: one step of AdamW as torch.optim.AdamW takes it (Loshchilov & Hutter 2019), with the clip factor of
// torch.nn.utils.clip_grad_norm_. Clears the gradient.
#version 450
#extension GL_GOOGLE_include_directive : require
#include "adamw/adamw.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { adamw_pc pc; };
layout(set = 0, binding = 0) restrict buffer W { float w[]; };
layout(set = 0, binding = 1) restrict buffer G { float g[]; };
layout(set = 0, binding = 2) restrict buffer M { float m[]; };
layout(set = 0, binding = 3) restrict buffer V { float v[]; };
layout(set = 0, binding = 4) restrict readonly buffer Sums { float sums[]; }; // sums[0] = Σ g²

void main()
{
    const uint i = (gl_WorkGroupID.x + gl_WorkGroupID.y * gl_NumWorkGroups.x) * 64u + gl_LocalInvocationID.x;
    if (i < pc.n) {
        const float factor = pc.clip > 0.0 ? min(1.0, pc.clip / (sqrt(sums[0]) + 1e-6)) : 1.0;
        const float gi = g[i] * factor;
        const float mi = pc.beta1 * m[i] + (1.0 - pc.beta1) * gi;
        const float vi = pc.beta2 * v[i] + (1.0 - pc.beta2) * gi * gi;
        const float denom = sqrt(vi) / pc.sqrt_bias2 + pc.eps;
        w[i] = w[i] * (1.0 - pc.lr * pc.weight_decay) - pc.lr / pc.bias1 * mi / denom;
        m[i] = mi;
        v[i] = vi;
        g[i] = 0.0;
    }
}
