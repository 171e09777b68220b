// SPDX-License-Identifier: MIT
// linear_fwd: y [T, N] = x [T, K] Wᵀ. Lane = row of W, so that weights are read once, in order, and x is the same address for
// all lanes; no lane needs another unless K is cut into slices.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "linear/linear.h"

layout(local_size_x_id = 0) in;                // 64 × SLICES
layout(constant_id = 1) const uint TILES = 1;  // tiles of rows a lane works on
layout(constant_id = 2) const uint TOKENS = 1; // tokens a lane works on
layout(constant_id = 3) const uint SLICES = 1; // parts of K, summed through shared memory
layout(constant_id = 4) const bool TAIL = false; // K is no multiple of 32

layout(push_constant) uniform Push { linear_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer W { uint w_words[]; };
layout(set = 0, binding = 0) restrict readonly buffer W4 { uvec4 w_quads[]; };
layout(set = 0, binding = 1) restrict readonly buffer X { float x[]; }; // [T, K]
layout(set = 0, binding = 2) restrict buffer Y { float y[]; };          // [T, N]

#include "common/quant.glsl"

shared float part[SLICES > 1 ? (SLICES - 1) * 64 * TILES * TOKENS : 1];

void main()
{
    const uint r = SLICES == 1 ? gl_LocalInvocationID.x : gl_LocalInvocationID.x % 64u;
    const uint slice = SLICES == 1 ? 0u : gl_LocalInvocationID.x / 64u;
    const uint tile = gl_WorkGroupID.x * TILES;
    const uint t0 = pc.t0 + gl_WorkGroupID.y * TOKENS;
    const uint words = tile_words(pc.kb);
    const uint last_tile = pc.tiles - 1u;

    uint base[TILES];
    [[unroll]] for (uint a = 0; a < TILES; a++) {
        base[a] = (pc.tile0 + min(tile + a, last_tile)) * words;
    }
    uint row[TOKENS];
    [[unroll]] for (uint t = 0; t < TOKENS; t++) {
        row[t] = min(t0 + t, pc.n_tokens - 1u) * pc.k;
    }
    float acc[TILES * TOKENS];
    [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
        acc[i] = 0.0;
    }
    for (uint kb = slice; kb < pc.kb; kb += SLICES) {
        Scale s[TILES];
        [[unroll]] for (uint j = 0; j < 4u; j++) {
            float w[TILES * 8];
            [[unroll]] for (uint a = 0; a < TILES; a++) {
                if (j % SCALE_SPAN == 0u) {
                    s[a] = fetch_scale(base[a], pc.kb, kb, r, j);
                }
                float v[8];
                fetch8(base[a], pc.kb, kb, r, j, s[a], v);
                [[unroll]] for (uint i = 0; i < 8u; i++) {
                    w[a * 8u + i] = v[i];
                }
            }
            [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                [[unroll]] for (uint i = 0; i < 8u; i++) {
                    const uint col = kb * 32u + 8u * j + i;
                    const float xv = x[row[t] + (TAIL ? min(col, pc.k - 1u) : col)]; // W is zero beyond K
                    [[unroll]] for (uint a = 0; a < TILES; a++) {
                        acc[a * TOKENS + t] += w[a * 8u + i] * xv;
                    }
                }
            }
        }
    }
    if (SLICES > 1) {
        if (slice > 0) {
            [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
                part[((slice - 1u) * TILES * TOKENS + i) * 64u + r] = acc[i];
            }
        }
        barrier();
        if (slice == 0) {
            for (uint o = 0; o < SLICES - 1u; o++) {
                [[unroll]] for (uint i = 0; i < TILES * TOKENS; i++) {
                    acc[i] += part[(o * TILES * TOKENS + i) * 64u + r];
                }
            }
        }
    }
    if (slice == 0) {
        [[unroll]] for (uint a = 0; a < TILES; a++) {
            const uint n = (pc.tile0 + tile + a) * 64u + r;
            if (tile + a < pc.tiles && n < pc.n) {
                [[unroll]] for (uint t = 0; t < TOKENS; t++) {
                    if (t0 + t < pc.n_tokens) {
                        const uint at = (t0 + t) * pc.n_total + pc.row0 + n;
                        y[at] = pc.add != 0u ? y[at] + acc[a * TOKENS + t] : acc[a * TOKENS + t];
                    }
                }
            }
        }
    }
}
