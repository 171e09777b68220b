// SPDX-License-Identifier: MIT
// shaders/common/exchange.glsl: eight values that all lanes of a workgroup need. The base form reads them with the same address in
// every lane (one scalar load on a GPU); EXCHANGE reads each in one lane of eight and hands it around (CPU drivers read lane by lane).
// Shuffles, not broadcasts: lavapipe 22.3 looks for the first active lane in a loop before each broadcast, 60 instructions instead of one.
//   EIGHT(v, n)             declares n groups of eight
//   FILL_EIGHT(v, g, I, e)  group g, value I is e; e must be a valid expression for I = 0 ... 7
//   PICK_EIGHT(v, g, i)     value i (a literal) of group g
//   EACH_EIGHT(X)           X(0u) ... X(7u)
//   FOURS, FILL_FOURS       the same for eight vec4; PICK_FOUR(v, i, j) is component j of vector i, both known when unrolled
//   ONE_SUBGROUP(n)         whether groups of n neighbouring lanes are whole subgroups, so that values which all of n need may be shared
//   OPERAND(n, v)           binding n, f32, read as v(index): a storage buffer, or with EXCHANGE texels (n: 0, or 0 and 1); also
//                           v_four(index), four of them from a multiple of four on, which needs no choice of a component
//   WORDS(n, v)             the same for u32
#ifdef EXCHANGE
#extension GL_KHR_shader_subgroup_shuffle : require
#define EIGHT(v, n) float v[n]
#define FILL_EIGHT(v, g, I, e) \
    { \
        const uint I = gl_SubgroupInvocationID & 7u; \
        v[g] = e; \
    }
#define PICK_EIGHT(v, g, i) subgroupShuffle(v[g], i)
#define FOURS(v) vec4 v
#define FILL_FOURS(v, I, e) \
    { \
        const uint I = gl_SubgroupInvocationID & 7u; \
        v = e; \
    }
#define PICK_FOUR(v, i, j) subgroupShuffle(v[j], i)
#define ONE_SUBGROUP(n) (gl_SubgroupSize <= (n))
#define OPERAND(n, v) \
    layout(set = 0, binding = n) uniform samplerBuffer v##_texels; \
    vec4 v##_four(uint at) \
    { \
        return texelFetch(v##_texels, int(at >> 2)); \
    } \
    float v(uint at) \
    { \
        return v##_four(at)[at & 3u]; \
    }
#define WORDS(n, v) \
    layout(set = 0, binding = n) uniform usamplerBuffer v##_texels; \
    uvec4 v##_four(uint at) \
    { \
        return texelFetch(v##_texels, int(at >> 2)); \
    } \
    uint v(uint at) \
    { \
        return v##_four(at)[at & 3u]; \
    }
#else
#define EIGHT(v, n) float v[(n) * 8]
#define FILL_EIGHT(v, g, I, e) \
    [[unroll]] for (uint I = 0; I < 8u; I++) { \
        v[(g) * 8u + I] = e; \
    }
#define PICK_EIGHT(v, g, i) v[(g) * 8u + (i)]
#define FOURS(v) vec4 v[8]
#define FILL_FOURS(v, I, e) \
    [[unroll]] for (uint I = 0; I < 8u; I++) { \
        v[I] = e; \
    }
#define PICK_FOUR(v, i, j) v[i][j]
#define ONE_SUBGROUP(n) true
#define OPERAND(n, v) \
    layout(set = 0, binding = n) restrict readonly buffer v##_buffer { float v##_values[]; }; \
    float v(uint at) \
    { \
        return v##_values[at]; \
    } \
    vec4 v##_four(uint at) \
    { \
        return vec4(v(at), v(at + 1u), v(at + 2u), v(at + 3u)); \
    }
#define WORDS(n, v) \
    layout(set = 0, binding = n) restrict readonly buffer v##_buffer { uint v##_values[]; }; \
    uint v(uint at) \
    { \
        return v##_values[at]; \
    } \
    uvec4 v##_four(uint at) \
    { \
        return uvec4(v(at), v(at + 1u), v(at + 2u), v(at + 3u)); \
    }
#endif
#define EACH_EIGHT(X) X(0u) X(1u) X(2u) X(3u) X(4u) X(5u) X(6u) X(7u)
