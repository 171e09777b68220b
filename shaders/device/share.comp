// SPDX-License-Identifier: MIT
// device/share.comp: what products spend their time on, in two ways: all lanes add up the same 512 numbers, and each adds quads of
// its own. Base shaders read storage buffers; with EXCHANGE eight lanes read each number once, as texels, and hand it around. Which
// is faster decides between variants: GPUs have scalar loads, CPU drivers read lane by lane.
#version 450
#ifdef EXCHANGE
#extension GL_KHR_shader_subgroup_shuffle : require
#endif
layout(local_size_x_id = 0) in; // 64

#ifdef EXCHANGE
layout(binding = 0) uniform samplerBuffer x4; // [128] of vec4
#else
layout(binding = 0) restrict readonly buffer X { float x[]; };  // [512]
layout(binding = 0) restrict readonly buffer X4 { vec4 x4[]; };
#endif
layout(binding = 1) restrict writeonly buffer Y { float y[]; }; // [invocations]
layout(push_constant) uniform Push { uint n; };

void main()
{
    vec4 sum = vec4(0.0); // apart, so that the reads are waited for and not the additions
    for (uint k = 0; k < n; k += 32u) {
#ifdef EXCHANGE
        const vec4 mine = texelFetch(x4, int(k >> 2) + int(gl_SubgroupInvocationID & 7u));
#define VALUE(i) subgroupShuffle(mine[(i) & 3u], (i) >> 2)
#else
#define VALUE(i) x[k + (i)]
#endif
#ifdef EXCHANGE
#define OWN(i) texelFetch(x4, int((k + 8u * (i) + gl_LocalInvocationID.x) & 127u))
#else
#define OWN(i) x4[(k + 8u * (i) + gl_LocalInvocationID.x) & 127u]
#endif
#define FOUR(i) sum += vec4(VALUE(i), VALUE(i + 1u), VALUE(i + 2u), VALUE(i + 3u));
        sum += OWN(0u) + OWN(1u) + OWN(2u) + OWN(3u); // as many as four rows of 4-bit weights
        FOUR(0u) FOUR(4u) FOUR(8u) FOUR(12u) FOUR(16u) FOUR(20u) FOUR(24u) FOUR(28u)
    }
    y[gl_GlobalInvocationID.x] = sum.x + sum.y + sum.z + sum.w;
}
