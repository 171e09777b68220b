// SPDX-License-Identifier: MIT
// device/copy.comp: copies 16-byte vectors, to measure what the memory can move.
#version 450
layout(local_size_x_id = 0) in;

layout(binding = 0) readonly buffer X { uvec4 x[]; };  // [n]
layout(binding = 1) writeonly buffer Y { uvec4 y[]; }; // [n]
layout(push_constant) uniform Push { uint n; };

void main()
{
    const uint i = gl_GlobalInvocationID.x;
    if (i < n) {
        y[i] = x[i];
    }
}
