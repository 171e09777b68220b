// SPDX-License-Identifier: MIT
// linear_coop: the products of linear_fwd and (BACKWARD) linear_bwd for many tokens, on cooperative matrices: f16 in, f32 sums.
// A workgroup makes BT tokens × BC columns of the result. Step by step through the depth, 32 at a time, its lanes lay down the
// activations and the weights as f16 in shared memory, and each of its subgroups multiplies its FRAGS_T × FRAGS_C fragments.
// Activations are multiplied by a power of two for each token, so that their largest is just below what f16 holds: nothing
// overflows, whatever the size, and what is lost is small beside that largest. With PAIRS each number is the sum of two f16, and
// the product of the lesser parts alone is left out: as good as f32 arithmetic, at three products instead of one.
// One sum goes through the depth in order, from what the result holds (BACKWARD, with add), so that cuts into dispatches change no bit.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#include "linear/linear.h"

layout(local_size_x_id = 0) in;                  // SUBS_T × SUBS_C subgroups
layout(constant_id = 1) const uint M = 16;       // a fragment: M tokens × K of the depth, K × N columns of the result
layout(constant_id = 2) const uint N = 16;
layout(constant_id = 3) const uint K = 16;
layout(constant_id = 4) const uint SUBS_T = 2;   // subgroups along the tokens, along the columns
layout(constant_id = 5) const uint SUBS_C = 2;
layout(constant_id = 6) const uint FRAGS_T = 2;  // fragments of a subgroup
layout(constant_id = 7) const uint FRAGS_C = 2;
layout(constant_id = 8) const bool PAIRS = true;
layout(constant_id = 9) const uint PARTS = 1;    // forward: matrices behind each other

#ifdef BACKWARD
layout(push_constant) uniform Push { linear_pc pc; };
#else
layout(push_constant) uniform Push { linear_fwd_pc pc; };
#endif
layout(set = 0, binding = 1) restrict readonly buffer X { float x[]; }; // [T, K]; BACKWARD: dy [T, N]
layout(set = 0, binding = 2) restrict buffer Y { float y[]; };          // [T, N] of each part; BACKWARD: dx [T, K]

#include "common/quant.glsl"

const uint SUBS = SUBS_T * SUBS_C;
const uint BT = SUBS_T * FRAGS_T * M;
const uint BC = SUBS_C * FRAGS_C * N; // 64 or 128
const uint DEPTH = 32;
const uint PAD = 4;                   // against bank conflicts, of two halves each
const uint X_ROW = DEPTH / 2 + PAD;   // from one row to the next, in pairs of halves
#ifdef BACKWARD
const uint W_ROW = BC / 2 + PAD, W_SIZE = DEPTH * W_ROW; // depth by depth
const int W_LAYOUT = gl_CooperativeMatrixLayoutRowMajor;
#else
const uint W_ROW = X_ROW, W_SIZE = BC * W_ROW;           // column by column
const int W_LAYOUT = gl_CooperativeMatrixLayoutColumnMajor;
#endif
const uint X_SIZE = BT * X_ROW;
const float W_SCALE = 64.0; // weights are below 1 as a rule; the lesser part of a pair would be lost below f16's smallest number

shared f16vec2 xs[PAIRS ? 2 * X_SIZE : X_SIZE];
shared f16vec2 ws[PAIRS ? 2 * W_SIZE : W_SIZE];
shared float stage[SUBS * M * N]; // a fragment of each subgroup on its way from or to the result
shared float scale[BT];

#define PART(p, field) \
    (PARTS == 1u || (p) == 0u ? pc.part[0].field : PARTS == 2u || (p) == 1u ? pc.part[1].field : pc.part[2].field)

// Two numbers into xs or ws. The greater part by its bits, rounded to f16's 11, not by conversion there and back: lavapipe 26.1 takes
// that for the number itself.
#define PUT(to, size, at, v) \
    { \
        const vec2 most = PAIRS ? uintBitsToFloat((floatBitsToUint(v) + 0x1000u) & 0xffffe000u) : v; \
        to[at] = f16vec2(most); \
        if (PAIRS) { \
            to[size + (at)] = f16vec2((v) - most); \
        } \
    }

#ifdef BACKWARD
uint depth_end()
{
    return min((pc.tile0 + pc.tiles) * 64u, pc.n);
}
#define X_STRIDE pc.n_total
#define X_FIRST pc.row0
#else
uint part_of(uint tile)
{
    return PARTS == 1u || tile < pc.part[1].tile ? 0u : PARTS == 2u || tile < pc.part[2].tile ? 1u : 2u;
}

// Tile of rows of W that gives columns 64a .. 64a+63 of this workgroup.
uint tile_of(uint a)
{
    return pc.tile0 + min(gl_WorkGroupID.x * (BC / 64u) + a, pc.tiles - 1u);
}
#define X_STRIDE pc.k
#define X_FIRST 0u
#endif

// Where column c of this workgroup and token t lie in the result; false if there is no such place.
bool place(uint t, uint c, out uint at)
{
#ifdef BACKWARD
    const uint col = gl_WorkGroupID.x * BC + c;
    at = t * pc.k + col;
    return t < pc.n_tokens && col < pc.k;
#else
    const uint a = c / 64u, tile = tile_of(a), p = part_of(tile);
    const uint n = (tile - PART(p, tile)) * 64u + c % 64u, rows = PART(p, n);
    at = PART(p, y) + t * (PARTS == 1u ? pc.n_total : rows) + pc.row0 + n;
    return t < pc.n_tokens && gl_WorkGroupID.x * (BC / 64u) + a < pc.tiles && n < rows;
#endif
}

// A power of two for each token.
void find_scales(uint t0)
{
    for (uint i = gl_SubgroupID; i < BT; i += SUBS) {
        const uint row = min(t0 + i, pc.n_tokens - 1u) * X_STRIDE;
        float most = 0.0;
        for (uint d = gl_SubgroupInvocationID; d < X_STRIDE; d += gl_SubgroupSize) {
            most = max(most, abs(x[row + d]));
        }
        most = subgroupMax(most);
        // 2^14 ≤ most · scale < 2^15; the limit keeps what is added within f32 where a row is all but zero
        const int power = min(14 + 127 - int(floatBitsToUint(most) >> 23), 80);
        scale[i] = uintBitsToFloat(uint(power + 127) << 23);
    }
}

// Activations of 32 depths from d on.
void lay_x(uint t0, uint d, uint end)
{
    for (uint q = gl_LocalInvocationID.x; q < BT * DEPTH / 4u; q += gl_WorkGroupSize.x) {
        const uint i = q / (DEPTH / 4u), c = q % (DEPTH / 4u) * 4u;
        const uint row = min(t0 + i, pc.n_tokens - 1u) * X_STRIDE + X_FIRST;
        vec4 v;
        [[unroll]] for (uint e = 0; e < 4u; e++) {
            v[e] = d + c + e < end ? x[row + d + c + e] * scale[i] : 0.0;
        }
        PUT(xs, X_SIZE, i * X_ROW + c / 2u, v.xy);
        PUT(xs, X_SIZE, i * X_ROW + c / 2u + 1u, v.zw);
    }
}

// Weights of 32 depths from d on. A lane unpacks 16.
void lay_w(uint d)
{
    const uint words = tile_words(pc.kb);
    for (uint q = gl_LocalInvocationID.x; q < BC * 2u; q += gl_WorkGroupSize.x) {
#ifdef BACKWARD
        const uint r = q % DEPTH, g = q / DEPTH;
        const uint group = min(gl_WorkGroupID.x * (BC / 16u) + g, pc.kb * 2u - 1u);
        const uint base = (d >> 6) * words, row = (d & 63u) + r, kb = group >> 1, p = group & 1u, at = r * W_ROW + g * 8u;
#else
        const uint r = q % BC, p = q / BC;
        const uint tile = tile_of(r / 64u), part = part_of(tile);
        const uint base = PART(part, w) + (tile - PART(part, tile)) * words;
        const uint row = r & 63u, kb = d / DEPTH, at = r * W_ROW + p * 8u;
#endif
        const Scale s = fetch_scale(base, pc.kb, kb, row, p);
        float w[16];
        fetch16(base, pc.kb, kb, row, p, Scale(s.d * W_SCALE, s.m * W_SCALE), w);
        [[unroll]] for (uint i = 0; i < 8u; i++) {
#ifdef FLOAT_TYPE
            const vec2 v = vec2(w[2u * i], w[2u * i + 1u]) * W_SCALE;
#else
            const vec2 v = vec2(w[2u * i], w[2u * i + 1u]);
#endif
            PUT(ws, W_SIZE, at + i, v);
        }
    }
}

void main()
{
    const uint t0 = pc.t0 + gl_WorkGroupID.y * BT;
    const uint sub_t = gl_SubgroupID / SUBS_C * (FRAGS_T * M), sub_c = gl_SubgroupID % SUBS_C * (FRAGS_C * N);
    const uint mine = gl_SubgroupID * (M * N);
    coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator> acc[FRAGS_T * FRAGS_C];
    find_scales(t0);
    barrier();
    [[unroll]] for (uint f = 0; f < FRAGS_T * FRAGS_C; f++) {
        acc[f] = coopmat<float, gl_ScopeSubgroup, M, N, gl_MatrixUseAccumulator>(0.0);
    }
#ifdef BACKWARD
    if (pc.add != 0u) {
        [[unroll]] for (uint f = 0; f < FRAGS_T * FRAGS_C; f++) {
            for (uint e = gl_SubgroupInvocationID; e < M * N; e += gl_SubgroupSize) {
                const uint i = sub_t + f / FRAGS_C * M + e / N;
                uint at;
                const bool there = place(t0 + i, sub_c + f % FRAGS_C * N + e % N, at);
                stage[mine + e] = there ? y[at] * scale[i] * W_SCALE : 0.0;
            }
            subgroupBarrier();
            coopMatLoad(acc[f], stage, mine, N, gl_CooperativeMatrixLayoutRowMajor);
            subgroupBarrier();
        }
    }
    const uint end = depth_end();
    for (uint d = pc.tile0 * 64u; d < end; d += DEPTH) {
#else
    const uint end = pc.k;
    for (uint d = 0; d < end; d += DEPTH) {
#endif
        lay_x(t0, d, end);
        lay_w(d);
        barrier();
        for (uint k = 0; k < DEPTH; k += K) {
            coopmat<float16_t, gl_ScopeSubgroup, M, K, gl_MatrixUseA> a[FRAGS_T], a_less[FRAGS_T];
            [[unroll]] for (uint i = 0; i < FRAGS_T; i++) {
                const uint at = (sub_t + i * M) * X_ROW + k / 2u;
                coopMatLoad(a[i], xs, at, X_ROW, gl_CooperativeMatrixLayoutRowMajor);
                if (PAIRS) {
                    coopMatLoad(a_less[i], xs, X_SIZE + at, X_ROW, gl_CooperativeMatrixLayoutRowMajor);
                }
            }
            [[unroll]] for (uint j = 0; j < FRAGS_C; j++) {
                coopmat<float16_t, gl_ScopeSubgroup, K, N, gl_MatrixUseB> b, b_less;
#ifdef BACKWARD
                const uint at = k * W_ROW + (sub_c + j * N) / 2u;
#else
                const uint at = (sub_c + j * N) * W_ROW + k / 2u;
#endif
                coopMatLoad(b, ws, at, W_ROW, W_LAYOUT);
                if (PAIRS) {
                    coopMatLoad(b_less, ws, W_SIZE + at, W_ROW, W_LAYOUT);
                }
                [[unroll]] for (uint i = 0; i < FRAGS_T; i++) {
                    const uint f = i * FRAGS_C + j;
                    if (PAIRS) {
                        acc[f] = coopMatMulAdd(a_less[i], b, acc[f]);
                        acc[f] = coopMatMulAdd(a[i], b_less, acc[f]);
                    }
                    acc[f] = coopMatMulAdd(a[i], b, acc[f]);
                }
            }
        }
        barrier();
    }
    [[unroll]] for (uint f = 0; f < FRAGS_T * FRAGS_C; f++) {
        coopMatStore(acc[f], stage, mine, N, gl_CooperativeMatrixLayoutRowMajor);
        subgroupBarrier();
        for (uint e = gl_SubgroupInvocationID; e < M * N; e += gl_SubgroupSize) {
            const uint i = sub_t + f / FRAGS_C * M + e / N;
            uint at;
            if (place(t0 + i, sub_c + f % FRAGS_C * N + e % N, at)) {
                const float v = stage[mine + e] / scale[i] / W_SCALE;
#ifdef BACKWARD
                y[at] = v;
#else
                y[at] = pc.add != 0u ? y[at] + v : v;
#endif
            }
        }
        subgroupBarrier();
    }
}
