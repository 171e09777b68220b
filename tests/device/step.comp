// SPDX-License-Identifier: MIT
// tests/device/step.comp: y = x · mul + add + param[0], modulo 2^32. Order-dependent when chained, so a missing barrier shows.
#version 450
layout(local_size_x_id = 0) in;

layout(constant_id = 1) const uint EXTRA = 0;

layout(binding = 0) readonly buffer X { uint x[]; };     // [n]
layout(binding = 1) writeonly buffer Y { uint y[]; };    // [n]
layout(binding = 2) readonly buffer P { uint param[]; }; // [1]
layout(push_constant) uniform Push { uint n, mul, add; };

void main()
{
    const uint i = gl_GlobalInvocationID.x;
    if (i < n) {
        y[i] = x[i] * mul + add + param[0] + EXTRA;
    }
}
