# SPDX-License-Identifier: MIT
"""Writes quant_vectors.h: what gguf-py makes of fixed bytes and of a fixed signal. Needs numpy and gguf.

Usage: python tests/data/quant_vectors.py > tests/data/quant_vectors.h
"""
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize

N = 4096
TYPES = [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q4_K, Q.Q5_K, Q.Q6_K]
# Relative rms errors on the signal: a few per cent above what ggml's own quantisers reach.
RMSE = {Q.F32: 0, Q.F16: 3e-4, Q.BF16: 2.3e-3, Q.Q4_0: 0.11, Q.Q4_1: 0.1, Q.Q5_0: 0.055, Q.Q5_1: 0.05, Q.Q8_0: 0.008,
        Q.Q4_K: 0.09, Q.Q5_K: 0.046, Q.Q6_K: 0.025}


def stream(seed, n):
    out = bytearray()
    for _ in range(n):
        seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(seed >> 24)
    return bytes(out)


def fnv(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = ((h ^ b) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def signal():
    b = np.frombuffer(stream(99, 4 * N), np.uint8).astype(np.int32).reshape(N, 4).sum(1)
    block = np.arange(N) // 256
    x = (b - 510).astype(np.float32) * np.where(block % 2 == 1, 2.0**-10, 2.0**-16).astype(np.float32)
    x[block == 3] = 0
    x[block == 4] = 0.75
    return x


def as_bytes(a):
    return np.ascontiguousarray(a).view(np.uint8).tobytes()


print("// SPDX-License-Identifier: MIT")
print("// tests/data/quant_vectors.h: made by quant_vectors.py with gguf-py; hashes are FNV-1a (keel_hash).")
print("static const struct quant_vector {")
print("    enum keel_dtype type;")
print("    uint32_t seed;        // of the random bytes")
print("    uint64_t dequantized; // hash of the floats they stand for")
print("    uint64_t quantized;   // hash of the quantised signal; 0: gguf-py has no such quantiser")
print("    double rmse;          // bound on the relative rms error of the signal")
print("} quant_vectors[] = {")
for k, t in enumerate(TYPES):
    elems, size = gguf.GGML_QUANT_SIZES[t]
    raw = np.frombuffer(stream(k + 1, N // elems * size), np.uint8)
    with np.errstate(all="ignore"):
        view = raw.view({Q.F32: np.float32, Q.F16: np.float16}.get(t, np.uint8))
        y = np.asarray(dequantize(view, t), np.float32).reshape(-1).copy()
    y.view(np.uint32)[np.isnan(y)] = 0x7FC00000
    try:
        q = fnv(as_bytes(quantize(signal(), t)))
    except NotImplementedError:
        q = 0
    print(f"    {{ KEEL_{t.name}, {k + 1}, 0x{fnv(as_bytes(y)):016x}ull, 0x{q:016x}ull, {RMSE[t]} }},")
print("};")
