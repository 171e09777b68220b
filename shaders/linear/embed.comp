// SPDX-License-Identifier: MIT
// embed: y [T, K] = scale · W[id[t], :], for the tokens whose row lies in this shard. Lane = 16 columns.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "linear/linear.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { embed_pc pc; };
layout(set = 0, binding = 1) restrict readonly buffer Ids { uint ids[]; }; // [T]
layout(set = 0, binding = 2) restrict writeonly buffer Y { float y[]; };   // [T, K]

#include "common/quant.glsl"

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    const uint t = gl_WorkGroupID.y;
    const uint n = ids[t] - pc.row0; // wraps far beyond pc.n for rows of earlier shards
    if (c < pc.kb * 2u && n < pc.n) {
        const uint base = (n >> 6) * tile_words(pc.kb);
        const uint kb = c >> 1, p = c & 1u;
        const Scale s = fetch_scale(base, pc.kb, kb, n & 63u, p);
        float w[16];
        fetch16(base, pc.kb, kb, n & 63u, p, s, w);
        [[unroll]] for (uint i = 0; i < 16u; i++) {
            const uint col = c * 16u + i;
            if (col < pc.k) {
                y[t * pc.k + col] = pc.scale * w[i];
            }
        }
    }
}
