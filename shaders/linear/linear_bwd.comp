// SPDX-License-Identifier: MIT
// linear_bwd: dx [T, K] = dy [T, N] W, from the same tiles as the forward product. Lane = 8 columns of W; rows are summed one
// after the other, so the result does not depend on how the device schedules work.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "linear/linear.h"

layout(local_size_x_id = 0) in;                // 64
layout(constant_id = 1) const uint TOKENS = 1; // tokens a lane works on

layout(push_constant) uniform Push { linear_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer W { uint w_words[]; };
layout(set = 0, binding = 0) restrict readonly buffer W4 { uvec4 w_quads[]; };
layout(set = 0, binding = 1) restrict readonly buffer DY { float dy[]; }; // [T, N]
layout(set = 0, binding = 2) restrict buffer DX { float dx[]; };          // [T, K]

#include "common/quant.glsl"

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x; // group of 8 columns
    const uint cc = min(c, pc.kb * 4u - 1u);
    const uint kb = cc >> 2, j = cc & 3u;
    const uint t0 = pc.t0 + gl_WorkGroupID.y * TOKENS;
    const uint words = tile_words(pc.kb);

    uint row[TOKENS];
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        row[t] = min(t0 + t, pc.n_tokens - 1u) * pc.n_total + pc.row0;
    }
    float acc[8 * TOKENS];
    [[unroll]] for (uint i = 0; i < 8u * TOKENS; i++) {
        acc[i] = 0.0;
    }
    const uint end = min((pc.tile0 + pc.tiles) * 64u, pc.n);
    for (uint n = pc.tile0 * 64u; n < end; n++) {
        const uint base = (n >> 6) * words;
        const Scale s = fetch_scale(base, pc.kb, kb, n & 63u, j);
        float w[8];
        fetch8(base, pc.kb, kb, n & 63u, j, s, w);
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            const float g = dy[row[t] + n];
            [[unroll]] for (uint i = 0; i < 8u; i++) {
                acc[t * 8u + i] += g * w[i];
            }
        }
    }
    if (c < pc.kb * 4u) {
        [[unroll]] for (uint t = 0; t < TOKENS; t++) {
            if (t0 + t < pc.n_tokens) {
                [[unroll]] for (uint i = 0; i < 8u; i++) {
                    const uint col = c * 8u + i;
                    if (col < pc.k) {
                        const uint at = (t0 + t) * pc.k + col;
                        dx[at] = pc.add != 0u ? dx[at] + acc[t * 8u + i] : acc[t * 8u + i];
                    }
                }
            }
        }
    }
}
