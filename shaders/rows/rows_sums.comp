// SPDX-License-Identifier: MIT
// rows_sums: adds to running sums over marked rows, a channel a lane: of x - shift, of its square, of |x|. Each total is a pair
// of floats whose sum holds twice the digits (Knuth 1997, two-sum), so that data sets of any size can be added up.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "rows/rows.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { rows_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer X { float x[]; };         // [T, D]
layout(set = 0, binding = 1) restrict readonly buffer Marks { float marks[]; }; // [T]
layout(set = 0, binding = 2) restrict readonly buffer Shift { float shift[]; }; // [D]
layout(set = 0, binding = 3) restrict buffer Sums { float sums[]; };            // [3, 2, D]

void add_to(uint i, float v)
{
    const uint hi = 2u * i * pc.width, lo = hi + pc.width, c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    const float old = sums[hi + c];
    precise float s = old + v;
    precise float part = s - old;
    precise float err = (old - (s - part)) + (v - part);
    sums[hi + c] = s;
    sums[lo + c] += err;
}

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x;
    if (c >= pc.width) {
        return;
    }
    const float at = shift[c];
    float sum = 0.0, square = 0.0, size = 0.0;
    for (uint t = 0; t < pc.n_rows; t++) {
        const float v = x[t * pc.width + c], d = v - at, m = marks[t];
        sum += m * d;
        square += m * d * d;
        size += m * abs(v);
    }
    add_to(0u, sum);
    add_to(1u, square);
    add_to(2u, size);
}
