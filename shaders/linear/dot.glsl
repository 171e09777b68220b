// SPDX-License-Identifier: MIT
// shaders/linear/dot.glsl: x in 8 bits, and its integer products with 32 weights of Q8_0 or Q4_0. Included by linear_fwd, whose constants,
// bindings and weights it uses. OpSDot by its number: glslang 12 has no name for it.
spirv_instruction(extensions = ["SPV_KHR_integer_dot_product"], capabilities = [6018, 6019], id = 4450)
int dot4(int a, int b, spirv_literal int packed_format); // 0: four signed bytes in a word

shared int x_words[KB * 8];     // Q4_0: of each eight columns first the even ones, then the odd ones, as its nibbles come
shared float x_scale[KB];
shared int x_sum[KB];           // Q4_0: nibbles are 8 more than they mean
shared uint x_part[KB * 4];     // largest of eight

// All lanes must call it. A lane takes eight columns.
void round_x(uint row)
{
    for (uint g = gl_LocalInvocationID.x; g < KB * 4u; g += gl_WorkGroupSize.x) {
        uint most = 0u; // of the bits, so that what is not a number stays on top
        [[unroll]] for (uint i = 0; i < 8u; i++) {
            most = max(most, floatBitsToUint(x[row + g * 8u + i]) & 0x7fffffffu);
        }
        x_part[g] = most;
    }
    barrier();
    for (uint g = gl_LocalInvocationID.x; g < KB * 4u; g += gl_WorkGroupSize.x) {
        const uint first = g & ~3u;
        const float most = uintBitsToFloat(max(max(x_part[first], x_part[first + 1u]), max(x_part[first + 2u], x_part[first + 3u])));
        const float inverse = most > 1e-30 ? 127.0 / most : 0.0;
        uint word[2] = uint[2](0u, 0u);
        [[unroll]] for (uint i = 0; i < 8u; i++) {
            const int v = int(roundEven(x[row + g * 8u + i] * inverse));
#ifdef Q_Q4_0
            word[i & 1u] |= (uint(v) & 255u) << (8u * (i >> 1));
#else
            word[i >> 2] |= (uint(v) & 255u) << (8u * (i & 3u));
#endif
        }
        x_words[g * 2u] = int(word[0]);
        x_words[g * 2u + 1u] = int(word[1]);
        if ((g & 3u) == 0u) {
            x_scale[g >> 2] = most / 127.0;
        }
    }
    barrier();
#ifdef Q_Q4_0
    for (uint kb = gl_LocalInvocationID.x; kb < KB; kb += gl_WorkGroupSize.x) {
        int sum = 0;
        [[unroll]] for (uint i = 0; i < 8u; i++) {
            sum += dot4(x_words[kb * 8u + i], 0x01010101, 0);
        }
        x_sum[kb] = sum;
    }
    barrier();
#endif
}

// Σ of 32 products, without scales.
int dot32(uint base, uint kb, uint r)
{
    int sum = 0;
#ifdef Q_Q4_0
    const uvec4 q = quad(base / 4u + kb * 64u + r);
    [[unroll]] for (uint i = 0; i < 4u; i++) {
        sum += dot4(int(q[i] & 0x0f0f0f0fu), x_words[kb * 8u + 2u * i], 0);
        sum += dot4(int(q[i] >> 4 & 0x0f0f0f0fu), x_words[kb * 8u + 2u * i + 1u], 0);
    }
    return sum - 8 * x_sum[kb];
#else
    const uvec4 low = quad(base / 4u + kb * 128u + r), high = quad(base / 4u + kb * 128u + 64u + r);
    [[unroll]] for (uint i = 0; i < 4u; i++) {
        sum += dot4(int(low[i]), x_words[kb * 8u + i], 0);
        sum += dot4(int(high[i]), x_words[kb * 8u + 4u + i], 0);
    }
    return sum;
#endif
}
