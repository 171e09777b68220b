// SPDX-License-Identifier: MIT
// shaders/common/half.glsl: two 16-bit floats in a word. SOFT_HALF is set for every pipeline by the device room, where a driver's own
// conversion does not work (src/device/caps.c).
layout(constant_id = 100) const bool SOFT_HALF = false;

float soft_half(uint h)
{
    const uint e = h >> 10 & 31u, m = h & 1023u;
    const float v = e == 0u ? float(m) * 5.9604644775390625e-8 // 2^-24
                            : uintBitsToFloat((e == 31u ? 255u : e + 112u) << 23 | m << 13);
    return uintBitsToFloat(floatBitsToUint(v) | (h & 0x8000u) << 16);
}

uint soft_half_bits(float v) // to the nearest, ties to even; |v| at most 65504, or not a number
{
    const uint u = floatBitsToUint(v), a = u & 0x7fffffffu;
    const uint h = a > 0x7f800000u  ? 0x7e00u
                 : a < 0x38800000u ? uint(roundEven(uintBitsToFloat(a) * 16777216.0)) // below 2^-14 in steps of 2^-24
                                   : a - 0x38000000u + 0xfffu + (a >> 13 & 1u) >> 13;
    return h | (u >> 16 & 0x8000u);
}

vec2 unpack_half(uint word)
{
    return SOFT_HALF ? vec2(soft_half(word & 0xffffu), soft_half(word >> 16)) : unpackHalf2x16(word);
}

uint pack_half(vec2 v)
{
    return SOFT_HALF ? soft_half_bits(v.x) | soft_half_bits(v.y) << 16 : packHalf2x16(v);
}
