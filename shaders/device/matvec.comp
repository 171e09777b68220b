// SPDX-License-Identifier: MIT
// device/matvec.comp: product of 4-bit weights with a vector, to measure what decoding can read: a lane works on two rows of its own
// and all share the vector, as in linear/. Peaks of arithmetic and copies promise what some drivers do not keep in such a loop.
#version 450
layout(local_size_x_id = 0) in;

layout(binding = 0) readonly buffer W { uvec2 w[]; };  // [groups][words][lanes]: eight weights of each of two rows
layout(binding = 1) readonly buffer X { vec4 x[]; };   // [2 words]
layout(binding = 2) writeonly buffer Y { vec2 y[]; };  // [groups][lanes]
layout(push_constant) uniform Push { uint words; };

float product(uint q, vec4 a, vec4 b)
{
    return float(int(q & 15)) * a.x + float(int(q >> 4 & 15)) * a.y + float(int(q >> 8 & 15)) * a.z + float(int(q >> 12 & 15)) * a.w
         + float(int(q >> 16 & 15)) * b.x + float(int(q >> 20 & 15)) * b.y + float(int(q >> 24 & 15)) * b.z + float(int(q >> 28)) * b.w;
}

void main()
{
    const uint tile = gl_WorkGroupID.x * words * gl_WorkGroupSize.x + gl_LocalInvocationID.x;
    vec2 sum = vec2(0.0);
    for (uint i = 0; i < words; ++i) {
        const uvec2 q = w[tile + i * gl_WorkGroupSize.x];
        const vec4 a = x[2 * i], b = x[2 * i + 1];
        sum += vec2(product(q.x, a, b), product(q.y, a, b));
    }
    y[gl_GlobalInvocationID.x] = sum;
}
