// SPDX-License-Identifier: MIT
// attn_mix: o[t, h, :] = scale · Σ_j P[h, t, j] b[j, g, :]; the output with (P, v), dq with (ds, k). Lane = element of the head;
// 4 tokens share each row of b.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "attention/attn_kv.glsl"
#include "attention/attention.h"

layout(local_size_x_id = 0) in;              // 64, less for narrow heads
layout(constant_id = 1) const uint ELEMS = 4; // elements of the head a lane works on: head_dim / local size, rounded up
const uint GROUP = 4;                        // KEEL_ATTENTION_GROUP

layout(push_constant) uniform Push { attention_pc pc; };
OPERAND(0, p)
layout(set = 0, binding = 2) restrict readonly buffer Spans { uint spans[]; };
layout(set = 0, binding = 3) restrict writeonly buffer O { float o[]; };       // [T, H, d]

float weight(uint at, uint j, uint lo, uint hi)
{
    const bool seen = j >= lo && j < hi;
    const float v = p(at + (seen ? j - lo : 0u));
    return seen ? v : 0.0;
}

void main()
{
    const uint h = gl_WorkGroupID.y, g = h / (pc.n_heads / pc.n_kv_heads);
    const uint row0 = (pc.group0 + gl_WorkGroupID.x) * GROUP;
    const uint last = pc.head_dim - 1u, stride = kv_stride(pc.head_dim);

    uint lo[GROUP], hi[GROUP], at[GROUP];
    float acc[GROUP * ELEMS];
    uint first = 0xffffffffu, end = 0u;
    [[unroll]] for (uint i = 0; i < GROUP; i++) {
        const uint row = min(row0 + i, pc.p_rows - 1u);
        const uint t = pc.t0 + row;
        lo[i] = spans[t * 8u];
        hi[i] = spans[t * 8u + 1u];
        at[i] = (h * pc.p_rows + row) * pc.p_cols;
        first = min(first, lo[i]);
        end = max(end, hi[i]);
    }
    [[unroll]] for (uint i = 0; i < GROUP * ELEMS; i++) {
        acc[i] = 0.0;
    }
    uint slot = first % pc.kv_rows;
#define ADD_KEY(weight_of_n) \
    { \
        const uint key = (slot * pc.n_kv_heads + g) * stride; \
        slot = slot + 1u == pc.kv_rows ? 0u : slot + 1u; \
        [[unroll]] for (uint e = 0; e < ELEMS; e++) { \
            const float bv = b_one(key, pc.head_dim, min(gl_LocalInvocationID.x + gl_WorkGroupSize.x * e, last)); \
            [[unroll]] for (uint n = 0; n < GROUP; n++) { \
                acc[n * ELEMS + e] += weight_of_n * bv; \
            } \
        } \
    }
#ifdef EXCHANGE
    [[dont_unroll]] for (uint j = first; j < end; j += 8u) {
        EIGHT(w, GROUP); // probabilities of eight keys; 0 for keys that a token does not see
        [[unroll]] for (uint i = 0; i < GROUP; i++) {
            FILL_EIGHT(w, i, I, weight(at[i], j + I, lo[i], hi[i]))
        }
#define MAC(i) \
    if (j + i < end) { \
        ADD_KEY(PICK_EIGHT(w, n, i)) \
    }
        EACH_EIGHT(MAC)
    }
#else // one key at a time: eight take SwiftShader (Chromium 156) gigabytes to compile
    [[dont_unroll]] for (uint j = first; j < end; j++) {
        float w[GROUP];
        [[unroll]] for (uint i = 0; i < GROUP; i++) {
            w[i] = weight(at[i], j, lo[i], hi[i]);
        }
        ADD_KEY(w[n])
    }
#endif
    [[unroll]] for (uint i = 0; i < GROUP; i++) {
        if (row0 + i < pc.p_rows) {
            [[unroll]] for (uint e = 0; e < ELEMS; e++) {
                const uint d = gl_LocalInvocationID.x + gl_WorkGroupSize.x * e;
                if (d < pc.head_dim) {
                    o[((pc.t0 + row0 + i) * pc.n_heads + h) * pc.head_dim + d] = pc.scale * acc[i * ELEMS + e];
                }
            }
        }
    }
}
