// SPDX-License-Identifier: MIT
// attn_scores: P[h, t, j] = scale · a[t, h, :] · b[j, g, :] for the keys that token t sees; scores with (q, k), the gradient of
// the probabilities with (d_o, v). Lane = key; 4 tokens share each key.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "attention/attn_kv.glsl"
#include "attention/attention.h"

layout(local_size_x_id = 0) in; // 64, or 32 for few keys
const uint GROUP = 4;           // KEEL_ATTENTION_GROUP

layout(push_constant) uniform Push { attention_pc pc; };
OPERAND(0, a) // [T, H, d]
layout(set = 0, binding = 2) restrict readonly buffer Spans { uint spans[]; }; // [T] of 8 words: lo, hi, ...
layout(set = 0, binding = 3) restrict writeonly buffer P { float p[]; };

void main()
{
    const uint h = gl_WorkGroupID.z, g = h / (pc.n_heads / pc.n_kv_heads);
    const uint row0 = (pc.group0 + gl_WorkGroupID.y) * GROUP;

    uint lo[GROUP], hi[GROUP], at[GROUP];
    float acc[GROUP];
    uint first = 0xffffffffu, end = 0u;
    [[unroll]] for (uint i = 0; i < GROUP; i++) {
        const uint t = min(pc.t0 + row0 + i, pc.n_tokens - 1u);
        lo[i] = spans[t * 8u];
        hi[i] = spans[t * 8u + 1u];
        at[i] = (t * pc.n_heads + h) * pc.head_dim;
        acc[i] = 0.0;
        first = min(first, lo[i]);
        end = max(end, hi[i]);
    }
    const uint j0 = first + gl_WorkGroupID.x * gl_WorkGroupSize.x;
    if (j0 < end) {
        const uint j = j0 + gl_LocalInvocationID.x;
        const uint key = (min(j, end - 1u) % pc.kv_rows * pc.n_kv_heads + g) * kv_stride(pc.head_dim);
        uint d = 0;
        [[dont_unroll]] for (; d + 8u <= pc.head_dim; d += 8u) {
            B_EIGHT(bv, key, pc.head_dim, d)
            EIGHT(av, GROUP);
            [[unroll]] for (uint i = 0; i < GROUP; i++) {
                FILL_EIGHT(av, i, I, a(at[i] + d + I))
            }
#define MAC(e) \
    [[unroll]] for (uint i = 0; i < GROUP; i++) { \
        acc[i] += PICK_EIGHT(av, i, e) * bv[e]; \
    }
            EACH_EIGHT(MAC)
        }
        [[dont_unroll]] for (; d < pc.head_dim; d++) {
            const float kv = b_one(key, pc.head_dim, d);
            [[unroll]] for (uint i = 0; i < GROUP; i++) {
                acc[i] += a(at[i] + d) * kv;
            }
        }
        [[unroll]] for (uint i = 0; i < GROUP; i++) {
            if (j >= lo[i] && j < hi[i] && row0 + i < pc.p_rows) {
                p[(h * pc.p_rows + row0 + i) * pc.p_cols + j - lo[i]] = pc.scale * acc[i];
            }
        }
    }
}
