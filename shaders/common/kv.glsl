// SPDX-License-Identifier: MIT
// shaders/common/kv.glsl: how a head of keys or values lies in memory: `d` floats, or packed in kv_stride(d) words, a multiple of
// four so that each head begins a texel.
//   KV_F16   two elements a word
//   KV_Q8_0  four codes of -127 ... 127 a word, zeros up to whole blocks of 32, then one f32 scale a block; element = scale · code
#define KV_BLOCK 32u
#ifdef KV_F16
#define KV_PACKED
uint kv_capacity(uint d) // elements that a head has room for
{
    return (d + 7u) / 8u * 8u;
}

uint kv_stride(uint d)
{
    return kv_capacity(d) / 2u;
}
#elif defined(KV_Q8_0)
#define KV_PACKED
uint kv_blocks(uint d)
{
    return (d + KV_BLOCK - 1u) / KV_BLOCK;
}

uint kv_capacity(uint d)
{
    return kv_blocks(d) * KV_BLOCK;
}

uint kv_scales(uint d) // where they begin in a head
{
    return kv_capacity(d) / 4u;
}

uint kv_stride(uint d)
{
    return (kv_scales(d) + kv_blocks(d) + 3u) / 4u * 4u; // to whole texels
}
#else
uint kv_stride(uint d)
{
    return d;
}
#endif
