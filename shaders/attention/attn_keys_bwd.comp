// SPDX-License-Identifier: MIT
// attn_keys_bwd: d[j, g, :] = or += scale · Σ_h Σ_t P[h, t, j] a[t, h, :] over the query heads of key head g and those tokens of P
// that see key j; dv with (P, d_o), dk with (ds, q). Lane = element of the head; 4 keys share each row of a.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "common/exchange.glsl"
#include "attention/attention.h"

layout(local_size_x_id = 0) in;               // 64, less for narrow heads
layout(constant_id = 1) const uint ELEMS = 4; // as in attn_mix
const uint GROUP = 4;                         // KEEL_ATTENTION_GROUP

layout(push_constant) uniform Push { attention_pc pc; };
OPERAND(0, p)
OPERAND(1, a)        // [T, H, d]
layout(set = 0, binding = 2) restrict readonly buffer Spans { uint spans[]; }; // lo, hi, slot, q_lo, q_hi
layout(set = 0, binding = 3) restrict buffer D { float dkv[]; };               // [T, G, d]

float weight(uint h, uint t, uint j)
{
    const uint lo = spans[t * 8u], hi = spans[t * 8u + 1u];
    const bool seen = j >= lo && j < hi;
    const float v = p((h * pc.p_rows + t - pc.t0) * pc.p_cols + (seen ? j - lo : 0u));
    return seen ? v : 0.0;
}

void main()
{
    const uint g = gl_WorkGroupID.y, per = pc.n_heads / pc.n_kv_heads;
    const uint j0 = (pc.group0 + gl_WorkGroupID.x) * GROUP;
    const uint last = pc.head_dim - 1u;

    uint t_first = 0xffffffffu, t_end = 0u;
    [[unroll]] for (uint i = 0; i < GROUP; i++) {
        const uint j = min(j0 + i, pc.n_tokens - 1u);
        t_first = min(t_first, spans[j * 8u + 3u]);
        t_end = max(t_end, spans[j * 8u + 4u]);
    }
    t_first = max(t_first, pc.t0);
    t_end = min(t_end, pc.t0 + pc.p_rows);
    float acc[GROUP * ELEMS];
    [[unroll]] for (uint i = 0; i < GROUP * ELEMS; i++) {
        acc[i] = 0.0;
    }
#define ADD_TOKEN(t, weight_of_n) \
    { \
        const uint row = ((t) * pc.n_heads + h) * pc.head_dim; \
        [[unroll]] for (uint e = 0; e < ELEMS; e++) { \
            const float av = a(row + min(gl_LocalInvocationID.x + gl_WorkGroupSize.x * e, last)); \
            [[unroll]] for (uint n = 0; n < GROUP; n++) { \
                acc[n * ELEMS + e] += weight_of_n * av; \
            } \
        } \
    }
    [[dont_unroll]] for (uint h = g * per; h < (g + 1u) * per; h++) {
#ifdef EXCHANGE
        [[dont_unroll]] for (uint t = t_first; t < t_end; t += 8u) {
            EIGHT(w, GROUP); // probabilities of four keys for eight tokens
            [[unroll]] for (uint n = 0; n < GROUP; n++) {
                FILL_EIGHT(w, n, I, weight(h, min(t + I, t_end - 1u), j0 + n))
            }
#define MAC(i) \
    if (t + i < t_end) { \
        ADD_TOKEN(t + i, PICK_EIGHT(w, n, i)) \
    }
            EACH_EIGHT(MAC)
        }
#else // one token at a time: eight take SwiftShader (Chromium 156) gigabytes to compile
        [[dont_unroll]] for (uint t = t_first; t < t_end; t++) {
            float w[GROUP];
            [[unroll]] for (uint n = 0; n < GROUP; n++) {
                w[n] = weight(h, t, j0 + n);
            }
            ADD_TOKEN(t, w[n])
        }
#endif
    }
    [[unroll]] for (uint i = 0; i < GROUP; i++) {
        if (j0 + i < pc.n_tokens) {
            [[unroll]] for (uint e = 0; e < ELEMS; e++) {
                const uint d = gl_LocalInvocationID.x + gl_WorkGroupSize.x * e;
                if (d < pc.head_dim) {
                    const uint at = ((j0 + i) * pc.n_kv_heads + g) * pc.head_dim + d;
                    const float v = pc.scale * acc[i * ELEMS + e];
                    dkv[at] = pc.add != 0u ? dkv[at] + v : v;
                }
            }
        }
    }
}
