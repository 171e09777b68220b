// SPDX-License-Identifier: MIT
// device/share.comp: all lanes add up the same 512 numbers, read by every lane (as base shaders do) or, with EXCHANGE, read once
// by eight lanes as texels and handed around. Which is faster decides between variants: GPUs have scalar loads, CPU drivers read lane by lane.
#version 450
#ifdef EXCHANGE
#extension GL_KHR_shader_subgroup_ballot : require
#endif
layout(local_size_x_id = 0) in; // 64

#ifdef EXCHANGE
layout(binding = 0) uniform samplerBuffer x4; // [128] of vec4
#else
layout(binding = 0) restrict readonly buffer X { float x[]; };  // [512]
#endif
layout(binding = 1) restrict writeonly buffer Y { float y[]; }; // [invocations]
layout(push_constant) uniform Push { uint n; };

void main()
{
    float sum = 0.0;
    for (uint k = 0; k < n; k += 8u) {
#ifdef EXCHANGE
        const float mine = texelFetch(x4, int(k >> 2) + int(gl_SubgroupInvocationID >> 2 & 1u))[gl_SubgroupInvocationID & 3u];
        sum += subgroupBroadcast(mine, 0u) + subgroupBroadcast(mine, 1u);
        sum += subgroupBroadcast(mine, 2u) + subgroupBroadcast(mine, 3u);
        sum += subgroupBroadcast(mine, 4u) + subgroupBroadcast(mine, 5u);
        sum += subgroupBroadcast(mine, 6u) + subgroupBroadcast(mine, 7u);
#else
        sum += x[k] + x[k + 1u];
        sum += x[k + 2u] + x[k + 3u];
        sum += x[k + 4u] + x[k + 5u];
        sum += x[k + 6u] + x[k + 7u];
#endif
    }
    y[gl_GlobalInvocationID.x] = sum;
}
