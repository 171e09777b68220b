// SPDX-License-Identifier: MIT
// device/matvec.comp: product of 4-bit weights with a vector, to measure what decoding can read: a lane works on two rows of its own
// and all share the vector, in the two forms that linear/ has (common/exchange.glsl). Peaks of arithmetic and copies promise what some
// drivers do not keep in such a loop.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "common/exchange.glsl"
layout(local_size_x_id = 0) in;

WORDS(0, w)   // [groups][words][lanes][4]: sixteen weights of each of two rows
OPERAND(1, x) // [16 words]
layout(set = 0, binding = 2) restrict writeonly buffer Y { vec2 y[]; }; // [groups][lanes]
layout(push_constant) uniform Push { uint words; };

void main()
{
    const uint tile = gl_WorkGroupID.x * words * gl_WorkGroupSize.x + gl_LocalInvocationID.x;
    vec2 sum = vec2(0.0);
    for (uint i = 0; i < words; ++i) {
        const uvec4 q = w_four((tile + i * gl_WorkGroupSize.x) * 4u);
        EIGHT(v, 2);
        FILL_EIGHT(v, 0, k, x(i * 16u + k))
        FILL_EIGHT(v, 1, k, x(i * 16u + 8u + k))
#define TERM(k) sum += vec2(float(int(q.x >> (k) * 4u & 15u)), float(int(q.z >> (k) * 4u & 15u))) * PICK_EIGHT(v, 0, k) \
                     + vec2(float(int(q.y >> (k) * 4u & 15u)), float(int(q.w >> (k) * 4u & 15u))) * PICK_EIGHT(v, 1, k);
        EACH_EIGHT(TERM)
    }
    y[gl_GlobalInvocationID.x] = sum;
}
