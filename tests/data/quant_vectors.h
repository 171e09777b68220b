// SPDX-License-Identifier: MIT
// tests/data/quant_vectors.h: made by quant_vectors.py with gguf-py; hashes are FNV-1a (keel_hash).
static const struct quant_vector {
    enum keel_dtype type;
    uint32_t seed;        // of the random bytes
    uint64_t dequantized; // hash of the floats they stand for
    uint64_t quantized;   // hash of the quantised signal; 0: gguf-py has no such quantiser
    double rmse;          // bound on the relative rms error of the signal
} quant_vectors[] = {
    { KEEL_F32, 1, 0x287bde8d8bb54f5cull, 0xf0b1ea97c9a7abb3ull, 0 },
    { KEEL_F16, 2, 0x951a42b4e761108cull, 0x17675bb13ae6411full, 0.0003 },
    { KEEL_BF16, 3, 0x07f45854ba67487eull, 0xfd7beb5ab80fd52full, 0.0023 },
    { KEEL_Q4_0, 4, 0x74e36d7db63204e9ull, 0xf85442c4b3f7a888ull, 0.11 },
    { KEEL_Q4_1, 5, 0x8dd28b84cca1ff07ull, 0x7c9ea8843c266a68ull, 0.1 },
    { KEEL_Q5_0, 6, 0x6cce594bb248f999ull, 0x010e125fcc526684ull, 0.055 },
    { KEEL_Q5_1, 7, 0xea0b5c6997c81d8cull, 0x6b32cf2e297c0d20ull, 0.05 },
    { KEEL_Q8_0, 8, 0xca0cf108360172a6ull, 0x15be7b480f496eefull, 0.008 },
    { KEEL_Q4_K, 9, 0x25432c90a8dad8c6ull, 0x0000000000000000ull, 0.09 },
    { KEEL_Q5_K, 10, 0x8d38991711c2a4ffull, 0x0000000000000000ull, 0.046 },
    { KEEL_Q6_K, 11, 0x12fb6b6c2b6e4ee6ull, 0x0000000000000000ull, 0.025 },
};
