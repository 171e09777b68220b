// SPDX-License-Identifier: MIT
// pool_bwd: dx[i] = dy of the square that row i lies in / kernel², zero outside all squares. A workgroup takes 64 columns of one row.
#version 450
#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "pool/pool.h"

layout(local_size_x_id = 0) in; // 64

layout(push_constant) uniform Push { pool_pc pc; };
layout(set = 0, binding = 0) restrict readonly buffer DY { float dy[]; };  // [side², D]
layout(set = 0, binding = 1) restrict writeonly buffer DX { float dx[]; }; // [grid², D]

void main()
{
    const uint c = gl_WorkGroupID.x * 64u + gl_LocalInvocationID.x, i = gl_WorkGroupID.y;
    if (c < pc.width) {
        const uint row = i / pc.grid / pc.kernel, col = i % pc.grid / pc.kernel;
        const bool inside = row < pc.side && col < pc.side;
        const float v = dy[(min(row, pc.side - 1u) * pc.side + min(col, pc.side - 1u)) * pc.width + c];
        dx[i * pc.width + c] = inside ? v / float(pc.kernel * pc.kernel) : 0.0;
    }
}
