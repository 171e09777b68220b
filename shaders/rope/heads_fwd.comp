// SPDX-License-Identifier: MIT
// heads_fwd: RMSNorm of each head, rotation by position, store into the cache row of the token, for queries, keys and values at
// once. One head a workgroup. Rotation: Su et al. 2021, pairs (i, i + d/2) as in GPT-NeoX.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rope/heads.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { heads_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };         // per part [T, H, d]
layout(set = 0, binding = 1) restrict readonly buffer W { float w[]; };         // per part [d]
layout(set = 0, binding = 2) restrict readonly buffer Rope { vec2 rope[]; };    // [T, d/2] cos, sin
layout(set = 0, binding = 3) restrict readonly buffer Spans { uint spans[]; };  // [T] of 8 words
layout(set = 0, binding = 4) writeonly buffer Y0 { float y0[]; };               // [rows, H, d] of part 0, ...
layout(set = 0, binding = 5) writeonly buffer Y1 { float y1[]; };
layout(set = 0, binding = 6) writeonly buffer Y2 { float y2[]; };

#include "common/reduce.glsl"

void store(uint part, uint at, float v)
{
    if (part == 0u) {
        y0[at] = v;
    } else if (part == 1u) {
        y1[at] = v;
    } else {
        y2[at] = v;
    }
}

void main()
{
    const uint t = gl_WorkGroupID.y;
    uint h = gl_WorkGroupID.x, part = 0u;
    heads_part p = pc.part[0];
    if (h >= p.n_heads) {
        h -= p.n_heads;
        part = 1u;
        p = pc.part[1];
        if (h >= p.n_heads) {
            h -= p.n_heads;
            part = 2u;
            p = pc.part[2];
        }
    }
    const uint d = pc.head_dim, half_d = d / 2u;
    const uint from = p.x + (t * p.n_heads + h) * d;
    const uint to_row = p.y_rows != 0u ? spans[t * 8u + 2u] % p.y_rows : t;
    const uint to = (to_row * p.n_heads + h) * d;
    float sum = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < d; i += 64u) {
        sum += x[from + i] * x[from + i];
    }
    // All lanes take part in the sum, also where it is not needed: no barrier may stand in a branch.
    const float r = 1.0 / sqrt(reduce_sum(sum, false) / float(d) + pc.eps);
    if (p.norm != 0u) {
        for (uint i = gl_LocalInvocationID.x; i < half_d; i += 64u) {
            const float a = x[from + i] * r * w[p.w + i];
            const float b = x[from + i + half_d] * r * w[p.w + i + half_d];
            const vec2 cs = rope[t * half_d + i];
            store(part, to + i, a * cs.x - b * cs.y);
            store(part, to + i + half_d, b * cs.x + a * cs.y);
        }
    } else {
        for (uint i = gl_LocalInvocationID.x; i < d; i += 64u) {
            store(part, to + i, x[from + i]);
        }
    }
}
