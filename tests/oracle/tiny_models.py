# SPDX-License-Identifier: MIT
"""tiny_models: seeded random gemma3 models of odd shapes as GGUF, and one as a Hugging Face folder.

    python tiny_models.py OUTDIR        writes every model of SHAPES and OUTDIR/tiny_a_hf

Owns shapes, vocabulary and weights. Same seed, same bytes. Weights are noise of the magnitude a trained model has
(row variance 1 / n_in, norms near 1), so that activations stay sane over all layers.
"""
import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

CORPUS = ("the clerk counts the red stones and the blue stones, and then the clerk writes the number in the book. "
          "a stone is red or blue; the sky is blue, the grass is green. what is the colour of the sky? the colour of "
          "the sky is blue. The clerk answers: it is green! (4 + 5 = 9, 12 - 3 = 9, 60 / 78 < 1). It's noon.")
SPACE = "\u2581"
CONTROL, USER, BYTE, NORMAL = 3, 4, 6, 1
K_TYPES = (Q.Q4_K, Q.Q5_K, Q.Q6_K)
ALL_TYPES = (Q.Q4_0, Q.Q4_K, Q.F16, Q.Q5_0, Q.Q6_K, Q.BF16, Q.Q4_1, Q.Q5_K, Q.Q8_0, Q.Q5_1)
ATTN = ("attn_q", "attn_k", "attn_v", "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass
class Shape:
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    window: int
    vocab: int
    types: tuple = (Q.F32,)
    embed: Q = Q.F32
    rope_factor: float = 0.0
    context: int = 1024
    seed: int = 1
    note: str = field(default="")


SHAPES = {
    "tiny_a": Shape(96, 160, 2, 1, 32, 7, 16, 384, seed=11, note="F32, one global layer, window 16"),
    "tiny_b": Shape(256, 512, 4, 2, 64, 10, 32, 384, ALL_TYPES, Q.Q6_K, seed=12, note="every quant type"),
    "tiny_c": Shape(72, 100, 3, 1, 24, 3, 9, 331, (Q.F32, Q.F16), Q.F16, seed=13, note="no dimension a power of two"),
    "tiny_d": Shape(64, 96, 2, 2, 32, 7, 8, 331, rope_factor=8.0, seed=14, note="linear rope scaling, no GQA"),
}


def vocabulary(size):
    """(tokens, scores, types) laid out as Gemma's: control, user-defined, bytes, merges by rank, characters."""
    toks = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", CONTROL), ("[multimodal]", USER),
            ("<start_of_turn>", CONTROL), ("<end_of_turn>", CONTROL)]
    toks += [("\n" * n, USER) for n in (1, 2, 3)] + [(" " * n, USER) for n in (2, 3, 4)] + [("\t", USER)]
    toks = [(t, -1000.0, k) for t, k in toks]
    toks += [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]
    tail = [("<start_of_image>", -1000.0, USER), ("<end_of_image>", -1000.0, USER)]
    chars = sorted(set(CORPUS.replace(" ", SPACE)) | set("adeilmnoprstu") | {"\u00e9", "\u00fc", "\u4e2d"})
    merges, words = [], [list(SPACE + w) for w in CORPUS.split(" ")]
    while len(toks) + len(tail) + len(chars) + len(merges) < size:
        count = {}
        for w in words:
            for a, b in zip(w, w[1:]):
                count[a + b] = count.get(a + b, 0) + 1
        best = max(count, key=lambda p: (count[p], p))
        merges.append(best)
        for w in words:
            i = 0
            while i + 1 < len(w):
                if w[i] + w[i + 1] == best:
                    w[i:i + 2] = [best]
                i += 1
    toks += [(p, -float(i + 1), NORMAL) for i, p in enumerate(merges + chars)]
    toks += tail
    assert len(toks) == size and len({t for t, _, _ in toks}) == size, (len(toks), size)
    return [t for t, _, _ in toks], [s for _, s, _ in toks], [k for _, _, k in toks]


def random_k_blocks(rng, qtype, n_out, n_in):
    """Random valid K-quant blocks scaled to variance 1 / n_in; gguf-py reads K-quants but cannot write them."""
    nb = n_out * n_in // 256
    raw = rng.integers(0, 256, (nb, {Q.Q4_K: 144, Q.Q5_K: 176, Q.Q6_K: 210}[qtype]), dtype=np.uint8)

    def with_scale(d):
        f16 = lambda v: np.frombuffer(np.float16(v).tobytes(), np.uint8)
        if qtype == Q.Q6_K:
            raw[:, 208:210] = f16(d)
        else:
            raw[:, 0:2] = f16(d)
            raw[:, 2:4] = f16(d * (7.5 if qtype == Q.Q4_K else 15.5))  # centres the quants
        return gguf.quants.dequantize(raw, qtype)

    with_scale(n_in ** -0.5 / with_scale(0.01).std() * 0.01)
    return raw.reshape(n_out, -1)


def make_weights(s):
    """[(name, type, numpy float data or raw quantised bytes)] in GGUF order."""
    def rng_of(name):
        return np.random.default_rng([s.seed, zlib.crc32(name.encode())])

    def matrix(name, qtype, n_out, n_in):
        rng = rng_of(name)
        if qtype in K_TYPES:
            return name, qtype, random_k_blocks(rng, qtype, n_out, n_in)
        w = (rng.standard_normal((n_out, n_in)) * n_in ** -0.5).astype(np.float32)
        return name, qtype, w if qtype == Q.F32 else gguf.quants.quantize(w, qtype)

    def norm(name, n):
        return name, Q.F32, (1 + 0.2 * rng_of(name).standard_normal(n)).astype(np.float32)

    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    dims = {"attn_q": (q, s.hidden), "attn_k": (kv, s.hidden), "attn_v": (kv, s.hidden), "attn_output": (s.hidden, q),
            "ffn_gate": (s.ff, s.hidden), "ffn_up": (s.ff, s.hidden), "ffn_down": (s.hidden, s.ff)}
    out = [matrix("token_embd.weight", s.embed, s.vocab, s.hidden), norm("output_norm.weight", s.hidden)]
    for i in range(s.layers):
        for k, part in enumerate(ATTN + FFN):
            # 7 parts a layer and 10 types are coprime: over 10 layers every part takes every type once.
            out.append(matrix(f"blk.{i}.{part}.weight", s.types[(i * 7 + k) % len(s.types)], *dims[part]))
        for part, n in (("attn_norm", s.hidden), ("attn_q_norm", s.head_dim), ("attn_k_norm", s.head_dim),
                        ("post_attention_norm", s.hidden), ("ffn_norm", s.hidden), ("post_ffw_norm", s.hidden)):
            out.append(norm(f"blk.{i}.{part}.weight", n))
    return out


def write_gguf(path, s, name="tiny", weights=None, skip=(), arch="gemma3", edit=None):
    """Writes one model. Tests break it on purpose: `skip` leaves out metadata keys by prefix, `edit` is called with
    the writer before the tensors are added."""
    w = gguf.GGUFWriter(str(path), arch)
    kv = [("gemma3.context_length", s.context, w.add_uint32), ("gemma3.embedding_length", s.hidden, w.add_uint32),
          ("gemma3.block_count", s.layers, w.add_uint32), ("gemma3.feed_forward_length", s.ff, w.add_uint32),
          ("gemma3.attention.head_count", s.heads, w.add_uint32),
          ("gemma3.attention.head_count_kv", s.kv_heads, w.add_uint32),
          ("gemma3.attention.key_length", s.head_dim, w.add_uint32),
          ("gemma3.attention.value_length", s.head_dim, w.add_uint32),
          ("gemma3.attention.layer_norm_rms_epsilon", 1e-6, w.add_float32),
          ("gemma3.attention.sliding_window", s.window, w.add_uint32),
          ("gemma3.rope.freq_base", 1e6, w.add_float32), ("general.name", name, w.add_string),
          ("general.file_type", 0, w.add_uint32)]
    if s.rope_factor:
        kv += [("gemma3.rope.scaling.type", "linear", w.add_string),
               ("gemma3.rope.scaling.factor", s.rope_factor, w.add_float32)]
    tokens, scores, types = vocabulary(s.vocab)
    kv += [("tokenizer.ggml.model", "llama", w.add_string), ("tokenizer.ggml.pre", "default", w.add_string),
           ("tokenizer.ggml.tokens", tokens, w.add_array), ("tokenizer.ggml.scores", scores, w.add_array),
           ("tokenizer.ggml.token_type", types, w.add_array),
           ("tokenizer.ggml.bos_token_id", 2, w.add_uint32), ("tokenizer.ggml.eos_token_id", 1, w.add_uint32),
           ("tokenizer.ggml.unknown_token_id", 3, w.add_uint32),
           ("tokenizer.ggml.padding_token_id", 0, w.add_uint32),
           ("tokenizer.ggml.add_bos_token", True, w.add_bool), ("tokenizer.ggml.add_eos_token", False, w.add_bool),
           ("tokenizer.ggml.add_space_prefix", False, w.add_bool)]
    for key, value, add in kv:
        if not any(key.startswith(p) for p in skip):
            add(key, value)
    if edit:
        edit(w)
    for tname, qtype, data in weights or make_weights(s):
        if not any(tname.startswith(p) for p in skip):
            w.add_tensor(tname, data, raw_dtype=None if qtype == Q.F32 else qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def tokenizer_json(size):
    """The same vocabulary as a tokenizer.json of the form Google ships: BPE, byte fallback, spaces as U+2581."""
    tokens, scores, types = vocabulary(size)
    ids = {t: i for i, t in enumerate(tokens)}
    normal = {t for t, k in zip(tokens, types) if k == NORMAL}
    merges = []
    for t in sorted(normal, key=lambda t: -scores[ids[t]]):
        merges += [[t[:i], t[i:]] for i in range(1, len(t)) if t[:i] in normal and t[i:] in normal]
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": k == CONTROL} for i, (t, k) in enumerate(zip(tokens, types)) if k in (CONTROL, USER)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": ids, "merges": merges}}


def write_hf(folder, s):
    """Hugging Face twin of an F32 shape, sharded in two files as large checkpoints are."""
    from safetensors.numpy import save_file

    from gemma3_ref import LINEARS, NORMS, PATTERN
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    sd = {}
    for name, _, data in make_weights(s):
        if name in names:
            dst = names[name]
        else:
            _, i, part, _ = name.split(".")
            dst = f"model.layers.{i}.{(LINEARS | NORMS)[part]}.weight"
        sd[dst] = (data - 1 if "norm" in name else data).astype(np.float32)
    keys = sorted(sd)
    index = {"metadata": {"total_size": sum(v.nbytes for v in sd.values())}, "weight_map": {}}
    for k, part in enumerate((keys[:len(keys) // 2], keys[len(keys) // 2:])):
        file = f"model-0000{k + 1}-of-00002.safetensors"
        save_file({n: sd[n] for n in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"].update({n: file for n in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    cfg = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": s.vocab,
           "hidden_size": s.hidden, "intermediate_size": s.ff, "num_hidden_layers": s.layers,
           "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
           "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": s.context, "rms_norm_eps": 1e-6,
           "query_pre_attn_scalar": s.head_dim, "sliding_window": s.window, "sliding_window_pattern": PATTERN,
           "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": None, "tie_word_embeddings": True,
           "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(cfg, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(s.vocab), ensure_ascii=False, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
         "pad_token": "<pad>", "unk_token": "<unk>", "add_bos_token": True, "model_max_length": s.context}, indent=1))


def write_all(outdir):
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    for name, s in SHAPES.items():
        write_gguf(outdir / f"{name}.gguf", s, name)
    write_hf(outdir / "tiny_a_hf", SHAPES["tiny_a"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: tiny_models.py OUTDIR")
    write_all(sys.argv[1])
