# SPDX-License-Identifier: MIT
"""make_full_size: GGUF files of the true Gemma 3 shapes with random weights, for memory and load tests.

    python make_full_size.py --shape 4b --mix q4_0 --tokenizer MODEL.gguf --out 4b.gguf [--mmproj 4b-mmproj.gguf]
    python make_full_size.py --shape 27b --mix q4_k_m --tokenizer MODEL.gguf --out 27b.gguf --plan-only
    python make_full_size.py --shape 270m --layers 6 --tokenizer MODEL.gguf --out 6.gguf
    python make_full_size.py --shape 4b --layers 1 --vision-layers 1 --tokenizer MODEL.gguf --out 1.gguf --mmproj 1-mmproj.gguf

Weights are random block codes with scales that give them the standard deviation of a trained model, so activations stay finite; the
file streams out in pieces of a few MB. --plan-only leaves the data a hole in the file: enough for `keel info`, and no disk is used.
The tokenizer's lists are copied from any Gemma 3 GGUF.
"""
import argparse
from dataclasses import dataclass, replace

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

STD = 0.02
PIECE = 4 << 20  # elements written at once


@dataclass
class Shape:
    layers: int
    width: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int
    context: int
    rope_factor: float = 0.0


SHAPES = {
    "270m": Shape(18, 640, 2048, 4, 1, 256, 262144, 512, 32768),
    "1b": Shape(26, 1152, 6912, 4, 1, 256, 262144, 512, 32768),
    "4b": Shape(34, 2560, 10240, 8, 4, 256, 262208, 1024, 131072, 8.0),
    "12b": Shape(48, 3840, 15360, 16, 8, 256, 262208, 1024, 131072, 8.0),
    "27b": Shape(62, 5376, 21504, 32, 16, 128, 262208, 1024, 131072, 8.0),
}
SIGLIP = {"layers": 27, "width": 1152, "ff": 4304, "heads": 16, "image": 896, "patch": 14}


# --- types: llama.cpp's mixtures, as models/gemma3/recipe.c has them ---------------------------------------------------

def fitting(kind, row):
    if row % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = {Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0}.get(kind, Q.F16)
    return kind


def type_of(name, row, mix, layers):
    base = {"q4_0": Q.Q4_0, "q4_k_m": Q.Q4_K}[mix]
    if name == "token_embd.weight":
        return fitting(Q.Q6_K, row) if row % gguf.GGML_QUANT_SIZES[base][0] == 0 else Q.Q8_0
    layer, part = int(name.split(".")[1]), name.split(".")[2]
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return fitting(Q.Q6_K if mix == "q4_k_m" and part in ("attn_v", "ffn_down") and more else base, row)


# --- random data --------------------------------------------------------------------------------------------------------

def put_f16(raw, at, value):
    raw[:, at: at + 2] = np.asarray(value, np.float16).reshape(-1, 1).view(np.uint8)


def scaled(raw, kind, factor):
    """Sets the scales of random blocks, a little different in each; `factor` is the standard deviation over the scale."""
    rng = np.random.default_rng(raw.shape[0])
    d = STD / factor * rng.uniform(0.7, 1.3, raw.shape[0])
    if kind == Q.Q6_K:
        put_f16(raw, 208, d)
    else:
        put_f16(raw, 0, d)
        if kind == Q.Q4_K:
            put_f16(raw, 2, 7.5 * d)  # centres the codes
    return raw


FACTOR = {}


def blocks(rng, kind, n):
    """n elements of a block type."""
    elems, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.frombuffer(rng.bytes(n // elems * size), np.uint8).reshape(-1, size).copy()
    if kind not in FACTOR:  # measured once on a small sample, not derived for each type
        sample = raw[:256].copy()
        FACTOR[kind] = STD
        FACTOR[kind] = float(gguf.quants.dequantize(scaled(sample, kind, STD), kind).std())
    return scaled(raw, kind, FACTOR[kind])


def data(rng, kind, n, mean):
    if kind in (Q.F32, Q.F16):
        x = rng.standard_normal(n, np.float32) * np.float32(STD if mean == 0 else 0.1) + np.float32(mean)
        return x.astype(np.float16 if kind == Q.F16 else np.float32)
    return blocks(rng, kind, n)


# --- the files ----------------------------------------------------------------------------------------------------------

class Writer:
    """gguf-py's writer with tensor data as a stream; `tensors` is a list of (name, type, shape in PyTorch's order, mean)."""

    def __init__(self, path, arch):
        self.w, self.tensors = gguf.GGUFWriter(str(path), arch), []

    def add(self, name, kind, *shape, mean=0.0):
        self.tensors.append((name, kind, shape, mean))

    def bytes_of(self, kind, shape):
        elems, size = gguf.GGML_QUANT_SIZES[kind]
        return int(np.prod(shape, dtype=np.int64)) // elems * size

    def close(self, seed, plan_only):
        w = self.w
        for name, kind, shape, _ in self.tensors:
            w.add_tensor_info(name, shape, np.dtype(np.float32), self.bytes_of(kind, shape), kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        f = w.fout[0]
        w.write_padding(f, f.tell())
        if plan_only:
            f.truncate(f.tell() + sum(-(-self.bytes_of(k, s) // 32) * 32 for _, k, s, _ in self.tensors))
        else:
            rng = np.random.default_rng(seed)
            for name, kind, shape, mean in self.tensors:
                n = int(np.prod(shape, dtype=np.int64))
                for at in range(0, n, PIECE):
                    f.write(data(rng, kind, min(PIECE, n - at), mean).tobytes())
                w.write_padding(f, self.bytes_of(kind, shape))
        w.close()


def put_tokenizer(w, source, vocab):
    get = lambda key: source.fields["tokenizer.ggml." + key].contents()
    tokens, scores, types = get("tokens"), get("scores"), get("token_type")
    for i in range(len(tokens), vocab):  # rows beyond the text vocabulary
        tokens.append("<image_soft_token>" if i == 262144 else f"[PAD{i}]")
        scores.append(-1000.0 if i == 262144 else -10000.0)
        types.append(3 if i == 262144 else 5)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(tokens[:vocab])
    w.add_token_scores(scores[:vocab])
    w.add_token_types(types[:vocab])
    w.add_bos_token_id(2)
    w.add_eos_token_id(1)
    w.add_unk_token_id(3)
    w.add_pad_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)


def write_text(path, name, layers, mix, tokenizer, seed, plan_only):
    s = replace(SHAPES[name], layers=layers or SHAPES[name].layers)
    out = Writer(path, "gemma3")
    w = out.w
    w.add_name(f"gemma3 {name} shapes, random weights")
    w.add_file_type({"q4_0": 2, "q4_k_m": 15}[mix])
    w.add_context_length(s.context)
    w.add_embedding_length(s.width)
    w.add_block_count(s.layers)
    w.add_feed_forward_length(s.ff)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.kv_heads)
    w.add_key_length(s.head_dim)
    w.add_value_length(s.head_dim)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_sliding_window(s.window)
    w.add_rope_freq_base(1e6)
    if s.rope_factor:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(s.rope_factor)
    put_tokenizer(w, gguf.GGUFReader(str(tokenizer)), s.vocab)
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    matrix = lambda n, rows, row: out.add(n, type_of(n, row, mix, s.layers), rows, row)
    matrix("token_embd.weight", s.vocab, s.width)
    out.add("output_norm.weight", Q.F32, s.width, mean=1.0)
    for i in range(s.layers):
        b = f"blk.{i}."
        for part, rows, row in (("attn_q", q, s.width), ("attn_k", kv, s.width), ("attn_v", kv, s.width), ("attn_output", s.width, q),
                                ("ffn_gate", s.ff, s.width), ("ffn_up", s.ff, s.width), ("ffn_down", s.width, s.ff)):
            matrix(f"{b}{part}.weight", rows, row)
        for part, n in (("attn_norm", s.width), ("attn_q_norm", s.head_dim), ("attn_k_norm", s.head_dim),
                        ("post_attention_norm", s.width), ("ffn_norm", s.width), ("post_ffw_norm", s.width)):
            out.add(f"{b}{part}.weight", Q.F32, n, mean=1.0)
    out.close(seed, plan_only)


def write_vision(path, width, layers, seed, plan_only):
    v = SIGLIP | {"layers": layers or SIGLIP["layers"]}
    out = Writer(path, "clip")
    w = out.w
    w.add_type("mmproj")
    w.add_name("siglip-so400m shapes, random weights")
    w.add_file_type(1)
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type(gguf.VisionProjectorType.GEMMA3)
    w.add_vision_use_gelu(True)
    w.add_vision_projection_dim(width)
    w.add_vision_image_size(v["image"])
    w.add_vision_patch_size(v["patch"])
    w.add_vision_embedding_length(v["width"])
    w.add_vision_feed_forward_length(v["ff"])
    w.add_vision_block_count(v["layers"])
    w.add_vision_head_count(v["heads"])
    w.add_vision_attention_layernorm_eps(1e-6)
    w.add_vision_image_mean([0.5] * 3)
    w.add_vision_image_std([0.5] * 3)
    d, p = v["width"], v["patch"]
    out.add("v.patch_embd.weight", Q.F32, d, 3, p, p)
    out.add("v.patch_embd.bias", Q.F32, d)
    out.add("v.position_embd.weight", Q.F32, (v["image"] // p) ** 2, d)
    for i in range(v["layers"]):
        for part, rows, row in (("attn_q", d, d), ("attn_k", d, d), ("attn_v", d, d), ("attn_out", d, d), ("ffn_up", v["ff"], d),
                                ("ffn_down", d, v["ff"])):
            out.add(f"v.blk.{i}.{part}.weight", Q.F16, rows, row)
            out.add(f"v.blk.{i}.{part}.bias", Q.F32, rows)
        for part in ("ln1", "ln2"):
            out.add(f"v.blk.{i}.{part}.weight", Q.F32, d, mean=1.0)
            out.add(f"v.blk.{i}.{part}.bias", Q.F32, d)
    out.add("v.post_ln.weight", Q.F32, d, mean=1.0)
    out.add("v.post_ln.bias", Q.F32, d)
    out.add("mm.soft_emb_norm.weight", Q.F32, d, mean=1.0)
    out.add("mm.input_projection.weight", Q.F16, d, width)
    out.close(seed, plan_only)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, required=True)
    p.add_argument("--layers", type=int, help="so many, not those of the shape; every sixth is global")
    p.add_argument("--mix", choices=("q4_0", "q4_k_m"), default="q4_0")
    p.add_argument("--tokenizer", required=True, help="a Gemma 3 GGUF whose tokenizer is copied")
    p.add_argument("--out", required=True)
    p.add_argument("--mmproj", help="also write a vision tower for it")
    p.add_argument("--vision-layers", type=int, help="so many blocks of the tower, not 27")
    p.add_argument("--plan-only", action="store_true")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    write_text(a.out, a.shape, a.layers, a.mix, a.tokenizer, a.seed, a.plan_only)
    if a.mmproj:
        write_vision(a.mmproj, SHAPES[a.shape].width, a.vision_layers, a.seed, a.plan_only)


if __name__ == "__main__":
    main()
