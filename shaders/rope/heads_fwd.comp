// SPDX-License-Identifier: MIT
// heads_fwd: RMSNorm of each head, rotation by position, store into the cache row of the token, for queries, keys and values at
// once. One head a workgroup. Rotation: Su et al. 2021, pairs (i, i + d/2) as in GPT-NeoX. With KV_F16 or KV_Q8_0 the cache holds
// packed heads.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rope/heads.h"

layout(local_size_x_id = 0) in; // common/reduce.glsl

layout(push_constant) uniform Push { heads_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };         // per part [T, H, d]
layout(set = 0, binding = 1) restrict readonly buffer W { float w[]; };         // per part [d]
layout(set = 0, binding = 2) restrict readonly buffer Rope { vec2 rope[]; };    // [T, d/2] cos, sin
layout(set = 0, binding = 3) restrict readonly buffer Spans { uint spans[]; };  // [T] of 8 words
#include "common/kv.glsl"
#ifdef KV_PACKED
#define WORD uint
#else
#define WORD float
#endif
layout(set = 0, binding = 4) writeonly buffer Y0 { WORD y0[]; };                // [rows, H, d] of part 0, ...
layout(set = 0, binding = 5) writeonly buffer Y1 { WORD y1[]; };
layout(set = 0, binding = 6) writeonly buffer Y2 { WORD y2[]; };

#include "common/half.glsl"
#include "common/reduce.glsl"

void store(uint part, uint at, WORD v)
{
    if (part == 0u) {
        y0[at] = v;
    } else if (part == 1u) {
        y1[at] = v;
    } else {
        y2[at] = v;
    }
}

#ifdef KV_PACKED
// Element i of the head as it is stored; r: one over its root mean square.
float value(const heads_part p, uint from, uint t, uint i, float r)
{
    const uint half_d = pc.head_dim / 2u, j = i < half_d ? i : i - half_d;
    if (p.norm == 0u) {
        return x[from + i];
    }
    const float a = x[from + j] * r * w[p.w + j], b = x[from + j + half_d] * r * w[p.w + j + half_d];
    const vec2 cs = rope[t * half_d + j];
    return i < half_d ? a * cs.x - b * cs.y : b * cs.x + a * cs.y;
}

// Elements e ... e + 3 of a head that begins at word `to`. `most`: the largest magnitude of their block.
void pack(uint part, uint to, uint e, float v[4], float most)
{
#ifdef KV_F16
    // Beyond what f16 can hold is the largest of it, not infinity.
    [[unroll]] for (uint i = 0; i < 4u; i += 2u) {
        store(part, to + (e + i) / 2u, pack_half(clamp(vec2(v[i], v[i + 1u]), -65504.0, 65504.0)));
    }
#else
    const float per_code = most > 0.0 ? 127.0 / most : 0.0;
    uint word = 0u;
    [[unroll]] for (uint i = 0; i < 4u; i++) {
        word |= (uint(int(roundEven(clamp(v[i] * per_code, -127.0, 127.0)))) & 0xffu) << (8u * i);
    }
    store(part, to + e / 4u, word);
    if (e % KV_BLOCK == 0u) {
        store(part, to + kv_scales(pc.head_dim) + e / KV_BLOCK, floatBitsToUint(most / 127.0));
    }
#endif
}

// The largest magnitude of a block, eight lanes wide. All lanes must call it.
float block_most(float v[4])
{
#ifdef KV_Q8_0
    barrier(); // the sum, or the call before, may still be read
    reduce_part[gl_LocalInvocationID.x] = max(max(abs(v[0]), abs(v[1])), max(abs(v[2]), abs(v[3])));
    barrier();
    float most = 0.0;
    [[unroll]] for (uint i = 0; i < KV_BLOCK / 4u; i++) {
        most = max(most, reduce_part[(gl_LocalInvocationID.x & ~(KV_BLOCK / 4u - 1u)) + i]);
    }
    return most;
#else
    return 0.0;
#endif
}
#endif

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
    const uint to = (to_row * p.n_heads + h) * (p.packed != 0u ? kv_stride(d) : d);
    float sum = 0.0;
    for (uint i = gl_LocalInvocationID.x; i < d; i += gl_WorkGroupSize.x) {
        sum += x[from + i] * x[from + i];
    }
    // All lanes take part in the sum, also where it is not needed: no barrier may stand in a branch.
    const float r = 1.0 / sqrt(reduce_sum(sum, false) / float(d) + pc.eps);
#ifdef KV_PACKED
    // A lane takes four elements in a row; to whole blocks, so that the words of a part of one are zero beyond the head.
    const uint quads = (d + KV_BLOCK - 1u) / KV_BLOCK * (KV_BLOCK / 4u);
    [[dont_unroll]] for (uint quad0 = 0; quad0 < quads; quad0 += gl_WorkGroupSize.x) {
        const uint e = 4u * (quad0 + gl_LocalInvocationID.x);
        float v[4];
        [[unroll]] for (uint i = 0; i < 4u; i++) {
            const float one = value(p, from, t, min(e + i, d - 1u), r);
            v[i] = e + i < d ? one : 0.0;
        }
        const float most = block_most(v);
        if (p.packed != 0u && e < kv_capacity(d)) {
            pack(part, to, e, v, most);
        }
        [[unroll]] for (uint i = 0; i < 4u; i++) {
            if (p.packed == 0u && e + i < d) {
                store(part, to + e + i, floatBitsToUint(v[i]));
            }
        }
    }
#else
    if (p.norm != 0u) {
        for (uint i = gl_LocalInvocationID.x; i < half_d; i += gl_WorkGroupSize.x) {
            const float a = x[from + i] * r * w[p.w + i];
            const float b = x[from + i + half_d] * r * w[p.w + i + half_d];
            const vec2 cs = rope[t * half_d + i];
            store(part, to + i, a * cs.x - b * cs.y);
            store(part, to + i + half_d, b * cs.x + a * cs.y);
        }
    } else {
        for (uint i = gl_LocalInvocationID.x; i < d; i += gl_WorkGroupSize.x) {
            store(part, to + i, x[from + i]);
        }
    }
#endif
}
