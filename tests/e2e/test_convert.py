# SPDX-License-Identifier: MIT
"""Hugging Face folders, convert and quantize: against transformers, the tokenizers library, gguf-py and llama.cpp."""
import ctypes as C
import json
import random
import shutil
import struct
import subprocess
from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file, save_file

import hf_models
import keellib
import texts
import tiny_models
from keelcli import generate, score, tokenize, write_rows

PROMPT = "the clerk counts the red stones and the blue stones, "
ROWS = [{"id": "a", "prompt": PROMPT, "completion": "and then the clerk writes the number in the book."},
        {"id": "b", "prompt": "", "completion": "It's noon. 4 + 5 = 9 \u4e2d\u6587 \U0001f600  x"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (folder, model); sharded, so that every tensor but the largest lies in a file with few others."""
    root = tmp_path_factory.mktemp("hf")
    made = {"f32": (hf_models.text_model(), "150KB"), "bf16": (hf_models.text_model(7, torch.bfloat16), "10MB"),
            "vision": (hf_models.vision_model(), "300KB")}
    out = {}
    for name, (model, shard) in made.items():
        out[name] = hf_models.save(model, root / name, max_shard_size=shard), model
    assert len(list((root / "f32").glob("*.safetensors"))) > 3 and len(list((root / "bf16").glob("*.safetensors"))) == 1
    return out


def reader(path):
    return gguf.GGUFReader(str(path))


def keys(path):
    return {k: f.contents() for k, f in reader(path).fields.items() if not k.startswith("GGUF.")}


def values(tensor):
    """A GGUF tensor as float32 in PyTorch's shape."""
    shape = [int(n) for n in reversed(tensor.shape)]
    if tensor.tensor_type == Q.F32:
        return np.asarray(tensor.data, np.float32).reshape(shape)
    return gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(shape)


def logprobs(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    lp = torch.log_softmax(logits, -1)
    return np.array([lp[i, ids[i + 1]] for i in range(len(ids) - 1)])


def check_scores(keel, folder, model, tmp_path, tol, *options):
    model = type(model).from_pretrained(folder, dtype=torch.float32).eval()  # .float() would leave the buffers rounded to bf16
    for row, got in zip(ROWS, score(keel, folder, ROWS, tmp_path, *options)):
        prompt = tokenize(keel, folder, row["prompt"] or " ", tmp_path)[: None if row["prompt"] else 1]
        want = logprobs(model, prompt + got["token_ids"])[len(prompt) - 1:]
        assert np.abs(np.array(got["token_logprobs"]) - want).max() < tol, row["id"]


# --- parity ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["f32", "bf16", "vision"])
def test_score_of_a_folder(keel, folders, tmp_path, name):
    check_scores(keel, *folders[name], tmp_path, 1e-3)


# One layer in three global, in a list; no scaling; a head of its own; other base frequencies.
@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] + ["sliding_attention"] * 2},
    {"num_hidden_layers": 2, "tie_word_embeddings": False, "rope_parameters": None},
    {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 9e3}}},
    {"num_hidden_layers": 2, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 9e3}}},
], ids=["pattern-3", "head", "all-global", "bases"])
def test_score_of_other_configs(keel, tmp_path, change):
    model = hf_models.text_model(9, **change)
    check_scores(keel, hf_models.save(model, tmp_path / "m"), model, tmp_path, 1e-3)


@pytest.mark.parametrize("kind,tol", [("f32", 1e-3), ("f16", 0.02)])
def test_score_with_an_image(keel, folders, tmp_path, kind, tol):
    """The folder as model and tower, and the two files made of it, against Gemma3ForConditionalGeneration from the pixels on."""
    Image = pytest.importorskip("PIL.Image")
    folder, model = folders["vision"]
    rgb = np.random.default_rng(3).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "p.png")
    row = {"id": 0, "prompt": "<image>what is it? ", "completion": "the stone is red", "images": ["p.png"]}
    if kind == "f32":
        files = folder, folder
    else:
        files = tmp_path / "m.gguf", tmp_path / "v.gguf"
        keel("convert", folder, "--out", files[0], "--mmproj-out", files[1], "--type", kind)
    got = score(keel, files[0], [row], tmp_path, "--mmproj", files[1])[0]
    tok, cfg = library(folder), model.config
    plain = lambda text: tok.encode(text, add_special_tokens=False).ids
    prompt = [2, *plain("\n\n"), cfg.boi_token_index, *[0] * 9, cfg.eoi_token_index, *plain("\n\nwhat is it? ")]
    assert got["token_ids"] == plain(row["completion"])
    ids = torch.tensor([prompt + got["token_ids"]])
    pixels = torch.tensor((rgb.astype(np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.no_grad():
        lp = model(input_ids=ids, pixel_values=pixels, token_type_ids=(ids == 0).long()).logits[0].log_softmax(-1)
    want = [float(lp[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1])]
    assert np.abs(np.subtract(got["token_logprobs"], want)).max() < tol


def hf_name(name):
    """GGUF tensor -> the name in the text part of transformers' state dict."""
    from gemma3_ref import LINEARS, NORMS
    whole = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    if name in whole:
        return whole[name]
    _, i, part, _ = name.split(".")
    return f"layers.{i}.{(LINEARS | NORMS)[part]}.weight"


@pytest.mark.parametrize("name,kind", [("f32", None), ("f32", Q.F16), ("f32", Q.Q8_0), ("f32", Q.Q4_0), ("bf16", None), ("bf16", Q.F32)])
def test_tensors_bit_for_bit(keel, folders, tmp_path, name, kind):
    folder, model = folders[name]
    keel("convert", folder, "--out", tmp_path / "m.gguf", *(["--type", kind.name.lower()] if kind else []))
    sd = {k.removeprefix("model."): v.detach() for k, v in model.state_dict().items()}
    seen = 0
    for t in reader(tmp_path / "m.gguf").tensors:
        w = sd[hf_name(t.name)].float().numpy()
        want = kind or (Q.F32 if name == "f32" else Q.BF16)
        if w.ndim == 1:
            assert t.tensor_type == Q.F32 and np.array_equal(t.data, w + np.float32(1)), t.name
        else:
            if t.name == "token_embd.weight" and kind == Q.Q4_0:
                want = Q.Q8_0  # the head gets more bits; 96 is no multiple of Q6_K's 256
            assert t.tensor_type == want, t.name
            q = w if want == Q.F32 else gguf.quants.quantize(w, want)
            assert np.array_equal(np.asarray(t.data).view(np.uint8).ravel(), np.ascontiguousarray(q).view(np.uint8).ravel()), t.name
        seen += 1
    assert seen == 2 + 7 * 13


@pytest.mark.parametrize("names", ["4.50", "4.52"])
def test_older_forms_give_the_same_file(keel, folders, tmp_path, names):
    src = folders["vision"][0]
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    shutil.copytree(src, tmp_path / "new" / "m")
    old = hf_models.rewrite(src, tmp_path / "old" / "m", hf_models.NAMES[names], old_config=True)
    for f, out in ((tmp_path / "new" / "m", "new"), (old, "old")):
        keel("convert", f, "--out", tmp_path / f"{out}.gguf", "--mmproj-out", tmp_path / f"{out}-v.gguf")
    for kind in ("", "-v"):
        assert (tmp_path / f"new{kind}.gguf").read_bytes() == (tmp_path / f"old{kind}.gguf").read_bytes()


def test_metadata(keel, folders, tmp_path):
    keel("convert", folders["f32"][0], "--out", tmp_path / "m.gguf")
    k = keys(tmp_path / "m.gguf")
    want = {"general.architecture": "gemma3", "general.type": "model", "gemma3.block_count": 7, "gemma3.embedding_length": 96,
            "gemma3.feed_forward_length": 160, "gemma3.attention.head_count": 3, "gemma3.attention.head_count_kv": 1,
            "gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32, "gemma3.attention.sliding_window": 9,
            "gemma3.context_length": 512, "gemma3.rope.freq_base": 1e6, "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0, "general.file_type": 0, "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_space_prefix": False}
    assert {n: k.get(n) for n in want} == want
    tokens, scores, types = tiny_models.vocabulary(hf_models.TOKENS)
    n = len(tokens)
    assert k["tokenizer.ggml.tokens"] == tokens + [f"[PAD{i}]" for i in range(n, hf_models.VOCAB)]
    assert k["tokenizer.ggml.token_type"] == types + [5] * (hf_models.VOCAB - n)
    # Scores differ from SentencePiece's by where they begin; their order is what counts.
    made = [i for i in range(n) if types[i] == 1 and len(tokens[i]) > 1]
    got = k["tokenizer.ggml.scores"]
    assert sorted(made, key=lambda i: -got[i]) == sorted(made, key=lambda i: -scores[i])


def test_vision_file(keel, folders, tmp_path):
    folder, model = folders["vision"]
    keel("convert", folder, "--mmproj-out", tmp_path / "v.gguf", "--out", tmp_path / "m.gguf", "--type", "f16")
    k = keys(tmp_path / "v.gguf")
    want = {"general.architecture": "clip", "general.type": "mmproj", "clip.has_vision_encoder": True, "clip.projector_type": "gemma3",
            "clip.use_gelu": True, "clip.vision.image_size": 48, "clip.vision.patch_size": 8, "clip.vision.embedding_length": 48,
            "clip.vision.feed_forward_length": 80, "clip.vision.block_count": 2, "clip.vision.attention.head_count": 3,
            "clip.vision.projection_dim": 96, "clip.vision.projector.scale_factor": 2, "clip.vision.image_mean": [0.5] * 3,
            "clip.vision.image_std": [0.5] * 3}
    assert {n: k.get(n) for n in want} == want
    # gguf-py knows how llama.cpp's converter names each tensor.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 2)
    left = {t.name: t for t in reader(tmp_path / "v.gguf").tensors}
    for name, w in model.state_dict().items():
        name = name.removeprefix("model.").replace("_weight", ".weight")
        if not name.startswith(("vision_tower", "multi_modal_projector")) or ".head." in name:
            continue
        if "vision_model" not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        t = left.pop(names.get_name(name, (".weight", ".bias")))
        w = w.float().numpy() + (1 if "soft_emb_norm" in name else 0)
        assert t.tensor_type == (Q.F32 if w.ndim == 1 or "embd" in t.name else Q.F16), t.name
        assert np.array_equal(values(t), w if t.tensor_type == Q.F32 else w.astype(np.float16).astype(np.float32)), t.name
    assert not left
    keel("convert", folder, "--mmproj-out", tmp_path / "v32.gguf")
    assert {t.tensor_type for t in reader(tmp_path / "v32.gguf").tensors} == {Q.F32}
    keel("quantize", tmp_path / "v32.gguf", "--mmproj-out", tmp_path / "v8.gguf", "--type", "q8_0")
    got = Counter(t.tensor_type.name for t in reader(tmp_path / "v8.gguf").tensors)
    assert got["F16"] == 1 + 2 * 6  # rows of 48 and 80 hold no whole block


# --- llama.cpp -------------------------------------------------------------------------------------------------------

def llama_logprobs(path, ids):
    llama_cpp = pytest.importorskip("llama_cpp")
    ll = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, n_gpu_layers=0)
    ll.eval(ids)
    scores = torch.tensor(np.array(ll.scores[: len(ids)]))
    lp = torch.log_softmax(scores, -1)
    return np.array([lp[i, ids[i + 1]] for i in range(len(ids) - 1)])


@pytest.mark.parametrize("name,kind,tol", [("f32", None, 0.01), ("bf16", None, 0.05), ("vision", "f16", 0.02), ("f32", "q8_0", 0.2)])
def test_llama_cpp_loads_it(keel, folders, oracle, tmp_path, name, kind, tol):
    """llama.cpp keeps keys and values in f16 and rounds activations to the kind of the weights, hence the tolerances."""
    keel("convert", folders[name][0], "--out", tmp_path / "m.gguf", *(["--type", kind] if kind else []))
    got = score(keel, tmp_path / "m.gguf", ROWS[:1], tmp_path)[0]
    prompt = tokenize(keel, tmp_path / "m.gguf", PROMPT, tmp_path)
    want = llama_logprobs(tmp_path / "m.gguf", prompt + got["token_ids"])[len(prompt) - 1:]
    here = np.array(got["token_logprobs"])
    exact = np.array(oracle(tmp_path / "m.gguf").logprobs(prompt + got["token_ids"]))[len(prompt) - 1:]
    print(name, kind, "keel off by", np.abs(here - exact).max(), "llama.cpp off by", np.abs(want - exact).max())
    assert np.abs(here - exact).max() < 1e-3  # transformers in fp32 on the same dequantised weights
    assert np.abs(here - want).max() < tol


@pytest.mark.parametrize("width", [256, 96])
def test_types_are_llama_cpps(keel, tmp_path, width):
    """Every mixture, tensor by tensor, as llama.cpp's own quantiser chooses; 18 layers, so that all its rules take effect."""
    llama_cpp = pytest.importorskip("llama_cpp")
    s = tiny_models.Shape(width, 512, 2, 1, 32, 18, 16, 331, seed=3)
    tiny_models.write_gguf(tmp_path / "m.gguf", s)
    for kind, number in (("f16", 1), ("bf16", 32), ("q8_0", 7), ("q6_k", 18), ("q5_k_m", 17), ("q5_k_s", 16), ("q5_1", 9), ("q5_0", 8),
                         ("q4_k_m", 15), ("q4_k_s", 14), ("q4_1", 3), ("q4_0", 2)):
        keel("quantize", tmp_path / "m.gguf", "--out", tmp_path / "k.gguf", "--type", kind)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = number, 2
        assert llama_cpp.llama_model_quantize(str(tmp_path / "m.gguf").encode(), str(tmp_path / "l.gguf").encode(), params) == 0
        got, want = ({t.name: t.tensor_type.name for t in reader(tmp_path / f).tensors} for f in ("k.gguf", "l.gguf"))
        assert got == want, kind
        assert keys(tmp_path / "k.gguf")["general.file_type"] == keys(tmp_path / "l.gguf")["general.file_type"] == number


# --- quantize --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_folder_and_file_quantise_alike(keel, folders, tmp_path, kind):
    """A folder quantised on load, a GGUF of it quantised after, and the folder by `quantize`: the same weights."""
    folder = folders["f32"][0]
    keel("convert", folder, "--out", tmp_path / "f.gguf")
    keel("quantize", tmp_path / "f.gguf", "--out", tmp_path / "a.gguf", "--type", kind)
    keel("quantize", folder, "--out", tmp_path / "b.gguf", "--type", kind.upper())
    a, b = ({t.name: (t.tensor_type, t.data.tobytes()) for t in reader(tmp_path / f).tensors} for f in ("a.gguf", "b.gguf"))
    assert a == b
    assert score(keel, tmp_path / "a.gguf", ROWS, tmp_path) == score(keel, folder, ROWS, tmp_path, "--type", kind)


def test_requantising_to_its_own_type_changes_no_bit(keel, tiny, tmp_path):
    for name, kind in (("tiny_a", "f32"), ("tiny_c", "f16")):
        keel("quantize", tiny / f"{name}.gguf", "--out", tmp_path / "q.gguf", "--type", kind)
        was = {t.name: t for t in reader(tiny / f"{name}.gguf").tensors}
        for t in reader(tmp_path / "q.gguf").tensors:
            if t.tensor_type == was[t.name].tensor_type:
                assert t.data.tobytes() == was[t.name].data.tobytes(), t.name


def test_quantised_model_runs(keel, tiny, tmp_path):
    keel("quantize", tiny / "tiny_b.gguf", "--out", tmp_path / "q.gguf", "--type", "q8_0")
    ids, _ = generate(keel, tmp_path / "q.gguf", "the clerk", 4)
    assert len(ids) == 4


# --- tokenizer -------------------------------------------------------------------------------------------------------

def library(folder):
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_tokens_of_a_folder(keel, folders, tmp_path):
    """The library matches control tokens in the text, as keel does with --special."""
    folder = folders["f32"][0]
    tok = library(folder)
    for text in texts.TOKENIZER:
        # A literal U+2581 and runs longer than the longest token of spaces: docs/formats.md, "Tokenizer".
        if text and "\u2581" not in text and "     " not in text:
            assert tokenize(keel, folder, text, tmp_path, "--special") == tok.encode(text).ids, repr(text)


@pytest.mark.parametrize("seed", range(2))
def test_random_tokens_of_a_folder(keel, folders, tmp_path, seed):
    folder = folders["f32"][0]
    tok, rng = library(folder), random.Random(seed)
    tokens = [t for t, _, k in zip(*tiny_models.vocabulary(hf_models.TOKENS)) if k in (1, 3, 4) and t.strip(" ")]
    chars = [chr(c) for c in (9, 10, 0x41, 0xE9, 0x301, 0x200D, 0x4E2D, 0x1F600, 0x10FFFF)]
    text = "".join(rng.choice([rng.choice(tokens).replace("\u2581", " "), rng.choice(chars), " the clerk"]) for _ in range(3000))
    assert tokenize(keel, folder, text, tmp_path, "--special") == tok.encode(text).ids


def test_old_merges_and_missing_settings(keel, folders, tmp_path):
    """Merges as "a b", and no tokenizer_config.json: ids come from config.json, BOS from the template."""
    src = folders["f32"][0]
    old = hf_models.rewrite(src, tmp_path / "old")
    t = json.loads((old / "tokenizer.json").read_text())
    t["model"]["merges"] = [" ".join(m) for m in t["model"]["merges"]]
    (old / "tokenizer.json").write_text(json.dumps(t))
    (old / "tokenizer_config.json").unlink()
    assert tokenize(keel, old, PROMPT, tmp_path) == tokenize(keel, src, PROMPT, tmp_path)
    assert keel("tokenize", "-m", old, "--json", "").json["ids"] == [2]


def gemma_tokenizer(path):
    """Gemma 3's own vocabulary as the tokenizer.json that transformers' converter makes of it."""
    fields = reader(path).fields
    tokens, scores, types = (fields["tokenizer.ggml." + key].contents() for key in ("tokens", "scores", "token_type"))
    t = tiny_models.tokenizer_json(hf_models.TOKENS)
    written = [x.replace(" ", "\u2581") if k == 4 else x for x, k in zip(tokens, types)]
    ids = {x: i for i, x in enumerate(written)}
    merged = [i for i, k in enumerate(types) if k == 1 and len(tokens[i]) > 1]
    merges = [["\u2581" * a, "\u2581" * (n - a)] for n in range(2, 32) for a in range(1, n)]
    for i in sorted(merged, key=lambda i: -scores[i]):
        x = written[i]
        pairs = [(ids[x[:n]], ids[x[n:]]) for n in range(1, len(x)) if types[ids.get(x[:n], 0)] == 1 == types[ids.get(x[n:], 0)]]
        merges += [[written[a], written[b]] for a, b in sorted(pairs)]
    t["model"] |= {"vocab": ids, "merges": merges}
    t["added_tokens"] = [{"id": i, "content": x, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": k == 3} for i, (x, k) in enumerate(zip(written, types)) if k in (3, 4)]
    return t, len(tokens)


@pytest.mark.full
def test_gemmas_own_tokenizer(keel, real, tmp_path):
    """Ids from the folder, from the GGUF and from the library are the same, 262144 tokens and half a million merges."""
    t, n = gemma_tokenizer(real)
    folder = hf_models.save(hf_models.text_model(3, torch.bfloat16, vocab_size=n, hidden_size=32, head_dim=8, num_attention_heads=4,
                                                 query_pre_attn_scalar=8, num_hidden_layers=1), tmp_path / "m")
    (folder / "tokenizer.json").write_text(json.dumps(t, ensure_ascii=False))
    tok, rng = library(folder), random.Random(4)
    names = t["model"]["vocab"]
    pieces = [x.replace("\u2581", " ") for x in names]
    ranges = ((32, 127), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    rows = [x for x in texts.TOKENIZER if x] + ["".join(rng.choices(pieces, k=60)) for _ in range(60)]
    rows += ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(300)) for _ in range(20)]
    differ = 0
    for text in rows:
        text = text.replace("\u2581", " ")
        got = tokenize(keel, folder, text, tmp_path, "--special")
        assert got == tokenize(keel, real, text, tmp_path, "--special"), repr(text)
        differ += got != tok.encode(text).ids
        assert got == tok.encode(text).ids or " " * 32 in text, repr(text)
    assert differ <= 3


# --- the cache -------------------------------------------------------------------------------------------------------

def test_a_folder_is_converted_once(keel, folders, tmp_path):
    folder = hf_models.rewrite(folders["bf16"][0], tmp_path / "m")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    made = lambda: {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache/keel/models").glob("*.gguf")}
    keel("info", folder, env=env)
    first = made()
    keel("info", folder, env=env)
    assert len(first) == 1 and made() == first
    keel("info", folder, "--type", "q8_0", env=env)
    assert len(made()) == 2
    sd = load_file(folder / "model.safetensors")
    sd["model.norm.weight"] += 1
    save_file(sd, folder / "model.safetensors")
    keel("info", folder, env=env)
    assert len(made()) == 3


def test_stopped_while_a_folder_is_converted(folders, tmp_path, monkeypatch):
    """Ctrl-C, and a kill: nothing half-written under a model's name, and the next run converts and clears what is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lib, folder, made = keellib.Lib(), folders["vision"][0], lambda: sorted((tmp_path / "cache/keel/models").iterdir())

    def open_both():
        model, tower = C.c_void_p(), C.c_void_p()
        try:
            lib.call("keel_model_open", C.byref(model), str(folder).encode(), C.byref(lib.log))
            lib.call("keel_vision_open", C.byref(tower), str(folder).encode(), None, C.byref(lib.log))
        finally:
            lib.c.keel_vision_close(C.byref(tower))
            lib.c.keel_model_close(C.byref(model))

    lib.c.keel_interrupt()  # as the program's signal handler does
    with pytest.raises(keellib.Error, match="nothing was written"):
        open_both()
    assert made() == []
    lib.c.keel_interrupt_clear()
    open_both()
    files = made()
    assert [f.suffix for f in files] == [".gguf"] * 2
    gone = subprocess.Popen(["true"])
    gone.wait()
    for f in files:
        f.rename(f.with_name(f"{f.name}.tmp-{gone.pid}"))
    open_both()
    assert made() == files, "converted again, and what the killed process left is gone"


# --- bad input -------------------------------------------------------------------------------------------------------

def set_config(**change):
    def edit(cfg, _):
        cfg.update(change)
    return edit


def set_tensor(name, value):
    def edit(_, tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name))
    return edit


NAN = float("nan")
BAD = {
    "arch": (set_config(model_type="llama", architectures=["LlamaForCausalLM"]), "Gemma3ForCausalLM"),
    "layers": (set_config(num_hidden_layers=8, layer_types=None), "model.layers.7"),
    "fewer-layers": (set_config(num_hidden_layers=6, layer_types=None), "model.layers.6"),
    "width": (set_config(hidden_size=128), "hidden_size|shape"),
    "heads": (set_config(num_attention_heads=4), "q_proj"),
    "vocab": (set_config(vocab_size=400), "embed_tokens"),
    "head-dim": (set_config(head_dim=64, query_pre_attn_scalar=64), "q_proj"),
    "huge": (set_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "text": (set_config(hidden_size="96"), "hidden_size"),
    "scale": (set_config(query_pre_attn_scalar=100), "query_pre_attn_scalar"),
    "gelu": (set_config(hidden_activation="silu"), "hidden_activation"),
    "softcap": (set_config(final_logit_softcapping=30.0), "final_logit_softcapping"),
    "yarn": (set_config(rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
    "layer-types": (set_config(layer_types=["full_attention"]), "layer_types"),
    "layer-kind": (set_config(layer_types=["chunked_attention"] * 7), "chunked_attention"),
    "no-rule": (set_config(layer_types=["full_attention", "sliding_attention", "full_attention", "full_attention"] +
                           ["sliding_attention"] * 3), "layer_types"),
    "untied": (set_config(tie_word_embeddings=False), "lm_head"),
    "missing": (set_tensor("model.layers.3.mlp.up_proj.weight", None), "layers.3.mlp.up_proj"),
    "unknown": (set_tensor("model.layers.3.extra.weight", lambda _: torch.zeros(3)), "layers.3.extra"),
    "shape": (set_tensor("model.layers.3.mlp.up_proj.weight", lambda w: w.T.contiguous()), "layers.3.mlp.up_proj"),
    "dtype": (set_tensor("model.layers.3.mlp.up_proj.weight", lambda w: w.to(torch.int32)), "layers.3.mlp.up_proj"),
    "nan": (set_tensor("model.layers.3.mlp.up_proj.weight", lambda w: w.fill_(NAN)), "ffn_up"),
    "norm-nan": (set_tensor("model.norm.weight", lambda w: w.fill_(NAN)), "output_norm"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder(keel, folders, tmp_path, case):
    edit, says = BAD[case]
    folder = hf_models.rewrite(folders["f32"][0], tmp_path / "broken", edit=edit)
    r = keel("convert", folder, "--out", tmp_path / "m.gguf", rc=1)
    assert any(s.lower() in r.err.lower() for s in says.split("|")), r.err
    assert "broken" in r.err and not list(tmp_path.glob("*.gguf*"))
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    keel("info", folder, rc=1, env=env)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


BAD_TOKENIZER = {
    "no-object": (lambda t: [], "object"),
    "wordpiece": (lambda t: t["model"].update(type="WordPiece"), "WordPiece"),
    "no-fallback": (lambda t: t["model"].update(byte_fallback=False), "byte fallback"),
    "no-vocab": (lambda t: t["model"].pop("vocab"), "vocab"),
    "id-huge": (lambda t: t["model"]["vocab"].update(x=10**9), "vocab_size"),
    "id-minus": (lambda t: t["model"]["vocab"].update(x=-1), "id -1"),
    "id-twice": (lambda t: t["model"]["vocab"].update(qqq=300), "300"),
    "merge": (lambda t: t["model"]["merges"].append(["zzz", "qqq"]), "zzzqqq"),
    "merge-shape": (lambda t: t["model"]["merges"].append(["a"]), "merge"),
    "merge-number": (lambda t: t["model"]["merges"].append(7), "merge"),
    "added": (lambda t: t["added_tokens"].append({"id": 5, "content": "other"}), "other"),
    "added-id": (lambda t: t["added_tokens"].append({"id": "5", "content": "other"}), "other"),
    "strip": (lambda t: t["added_tokens"][4].update(lstrip=True), "strip"),
    "normalizer": (lambda t: t.update(normalizer={"type": "NFKC"}), "normalizer"),
    "split": (lambda t: t.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZER)
def test_bad_tokenizer(keel, folders, tmp_path, case):
    edit, says = BAD_TOKENIZER[case]
    folder = hf_models.rewrite(folders["f32"][0], tmp_path / "broken")
    t = json.loads((folder / "tokenizer.json").read_text())
    t = [] if edit(t) == [] else t
    (folder / "tokenizer.json").write_text(json.dumps(t))
    r = keel("convert", folder, "--out", tmp_path / "m.gguf", rc=1)
    assert says.lower() in r.err.lower() and "tokenizer.json" in r.err, r.err


def test_missing_and_damaged_files(keel, folders, tmp_path):
    src = folders["f32"][0]
    for name, says in (("config.json", "config.json"), ("tokenizer.json", "tokenizer.json"),
                       ("model-00002-of-", "model-00002-of-"), ("model.safetensors.index.json", "safetensors")):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(src, folder)
        gone = next(folder.glob(name + "*"))
        data = gone.read_bytes()
        gone.unlink()
        keel.fails("convert", folder, "--out", tmp_path / "m.gguf", says=says)
        for cut in (0, 1, len(data) // 2, len(data) - 2):
            gone.write_bytes(data[:cut])
            keel.fails("convert", folder, "--out", tmp_path / "m.gguf", says=gone.name)
    assert not (tmp_path / "m.gguf").exists()


def test_index_that_lies(keel, folders, tmp_path):
    src = folders["f32"][0]
    for change, says in (({"model.norm.weight": "../other.safetensors"}, "model.norm.weight"), ({"model.norm.weight": 5}, "model.norm.weight"),
                         ({"model.more.weight": "model-00001-of-"}, "model.more.weight"), ({"model.norm.weight": "no.safetensors"}, "no.safetensors")):
        folder = tmp_path / "m"
        shutil.copytree(src, folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        first = sorted(set(index["weight_map"].values()))[0]
        index["weight_map"].update({k: first if v == "model-00001-of-" else v for k, v in change.items()})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        keel.fails("convert", folder, "--out", tmp_path / "m.gguf", says=says)
        shutil.rmtree(folder)
    folder = tmp_path / "m"
    shutil.copytree(src, folder)  # one tensor in two shards
    shards = sorted(folder.glob("*.safetensors"))
    sd = load_file(shards[0])
    name, value = next(iter(load_file(shards[1]).items()))
    save_file({**sd, name: value}, shards[0])
    keel.fails("convert", folder, "--out", tmp_path / "m.gguf", says=name)


def test_wrong_use(keel, folders, tiny_a, tmp_path):
    folder = folders["f32"][0]
    out = tmp_path / "m.gguf"
    keel.fails("convert", folder, "--out", out, "--type", "q3_k", says="q4_k_m")
    keel.fails("convert", folder, "--mmproj-out", out, says="vision_config")
    keel.fails("quantize", tiny_a, "--out", tiny_a, "--type", "q8_0", says="overwrite", rc=2)
    keel.fails("quantize", tiny_a, "--mmproj-out", out, "--type", "q8_0", says="clip")
    keel.fails("info", tiny_a, "--type", "q8_0", says="quantize")
    keel("convert", folder, rc=2)
    keel("quantize", tiny_a, "--out", out, rc=2)
    (tmp_path / "file").write_text("x")
    keel.fails("convert", folder, "--out", tmp_path / "file" / "m.gguf", says="m.gguf")
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pt" / "pytorch_model.bin").write_bytes(b"x")
    keel.fails("convert", tmp_path / "pt", "--out", out, says="safetensors")
    assert not out.exists()


def test_model_and_tower_or_neither(keel, folders, tmp_path):
    """One of the two cannot be made: the error names it and the other does not stay."""
    both = lambda folder, says: keel.fails("convert", folder, "--out", tmp_path / "m.gguf", "--mmproj-out", tmp_path / "v.gguf", says=says,
                                           leaves=tmp_path)
    both(folders["f32"][0], "vision_config")
    no_tokenizer = hf_models.rewrite(folders["vision"][0], tmp_path / "text")
    (no_tokenizer / "tokenizer.json").unlink()
    both(no_tokenizer, "tokenizer.json is missing")
    no_tower = hf_models.rewrite(folders["vision"][0], tmp_path / "tower", edit=set_tensor(
        next(n for n in load_file(no_tokenizer / "model.safetensors") if n.endswith("self_attn.q_proj.bias")), lambda w: w * NAN))
    both(no_tower, "NaN")


@pytest.mark.parametrize("kind", ["f16", "q4_1", "q4_0"])
def test_values_beyond_a_type(keel, folders, tmp_path, kind):
    """bf16 holds what f16, and the scales of blocks, do not: never infinity in silence."""
    name = "model.layers.3.mlp.up_proj.weight"
    folder = hf_models.rewrite(folders["bf16"][0], tmp_path / "m", edit=set_tensor(name, lambda w: w * 1e6))
    keel("convert", folder, "--out", tmp_path / "b.gguf")
    keel.fails("convert", folder, "--out", tmp_path / "m.gguf", "--type", kind, says=["blk.3.ffn_up", "bf16"])


def test_quantize_refuses_nan(keel, tiny, tmp_path):
    data = bytearray((tiny / "tiny_a.gguf").read_bytes())
    t = next(t for t in reader(tiny / "tiny_a.gguf").tensors if t.name == "blk.2.ffn_up.weight")
    data[t.data_offset + 400: t.data_offset + 404] = struct.pack("<f", NAN)
    (tmp_path / "bad.gguf").write_bytes(data)
    keel.fails("quantize", tmp_path / "bad.gguf", "--out", tmp_path / "q.gguf", "--type", "q8_0", says="blk.2.ffn_up.weight")
    assert not list(tmp_path.glob("q.gguf*"))


IMAGES = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 48, "width": 48},
          "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.4]}


@pytest.fixture
def pictured(folders, tmp_path):
    return shutil.copytree(folders["vision"][0], tmp_path / "m")


@pytest.mark.parametrize("files, mean", [
    ({"preprocessor_config.json": IMAGES}, [0.1, 0.2, 0.3]),
    ({"processor_config.json": {"image_processor": IMAGES, "image_seq_length": 9}}, [0.1, 0.2, 0.3]),  # as transformers 5 saves it
    ({"processor_config.json": {"image_processor": IMAGES}, "preprocessor_config.json": {"image_mean": [0.5] * 3}}, [0.1, 0.2, 0.3]),
    ({"processor_config.json": {"image_seq_length": 9}, "preprocessor_config.json": IMAGES}, [0.1, 0.2, 0.3]),
    ({"processor_config.json": {"image_seq_length": 9}}, [0.5, 0.5, 0.5]),
    ({"processor_config.json": {"image_processor": None}, "preprocessor_config.json": IMAGES | {"size": 48}}, [0.1, 0.2, 0.3]),
])
def test_image_settings(keel, pictured, tmp_path, files, mean):
    for name, content in files.items():
        (pictured / name).write_text(json.dumps(content))
    keel("convert", pictured, "--mmproj-out", tmp_path / "v.gguf")
    assert np.allclose(keys(tmp_path / "v.gguf")["clip.vision.image_mean"], mean)


@pytest.mark.parametrize("change", [
    {"resample": 3}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1.0}, {"do_resize": False},
    {"do_normalize": None}, {"size": {"height": 896, "width": 896}}, {"size": {"shortest_edge": 48}}, {"size": 20}, {"image_std": [0, 1, 1]}, {"image_mean": [0.5, 0.5]},
])
def test_image_settings_that_keel_does_not_follow(keel, pictured, tmp_path, change):
    (pictured / "processor_config.json").write_text(json.dumps({"image_processor": IMAGES | change}))
    value = [] if "image" in next(iter(change)) else [json.dumps(next(iter(change.values())))]
    keel.fails("convert", pictured, "--mmproj-out", tmp_path / "v.gguf", says=("processor_config.json", *change, *value), leaves=tmp_path)


def test_a_list_of_image_settings(keel, pictured, tmp_path):
    (pictured / "processor_config.json").write_text('{"image_processor": []}')
    keel.fails("convert", pictured, "--mmproj-out", tmp_path / "v.gguf", says="processor_config.json: image_processor: must be an object")


def test_a_new_processor_file_converts_anew(keel, pictured, tmp_path):
    """A folder is converted once into the cache; the file of transformers 5 is among those that count."""
    hashes = []
    for mean in (0.1, 0.2):
        (pictured / "processor_config.json").write_text(json.dumps({"image_processor": IMAGES | {"image_mean": [mean] * 3}}))
        keel("info", pictured, "--mmproj", pictured, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
        hashes.append(len(list((tmp_path / "cache").rglob("*.gguf"))))
    assert hashes[1] > hashes[0]


def test_study_and_doctor_take_folders(keel, folders, tiny_a, tmp_path):
    """As every command does: `model` and `mmproj` of a study file, and --type; the folder of a run tells a changed type."""
    folder = folders["vision"][0]
    write_rows(tmp_path / "rows.jsonl", [{"id": str(i), "prompt": f"stone {i} is", "completion": " red"} for i in range(2)])
    study = f"""name: folder
model: {folder}
mmproj: {folder}
type: q8_0
train: {{data: [{{file: rows.jsonl}}], rank: 2, steps: 1}}
eval: {{narrow: rows.jsonl}}
"""
    (tmp_path / "study.yaml").write_text(study)
    keel("study", tmp_path / "study.yaml", "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert "Q8_0" in json.dumps(manifest["model"]) and str(folder) in [d["file"] for d in manifest["data"]]
    keel("study", tmp_path / "study.yaml", "--out", tmp_path / "out")  # the same study
    keel.fails("study", tmp_path / "study.yaml", "--type", "q4_0", "--out", tmp_path / "out", says="another study", leaves=tmp_path / "out")
    keel.fails("doctor", "-m", tiny_a, "--type", "q8_0", says="a type is for Hugging Face folders")
    keel.fails("doctor", "--type", "q8_0", says="-m")


@pytest.mark.parametrize("left", [0, 5000, 0.5])
def test_a_damaged_conversion_is_made_anew(keel, pictured, tmp_path, left):
    """Not the folder's fault, which the user would fetch again for nothing."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    both = lambda: keel("info", pictured, "--mmproj", pictured, env=env)
    first = both()
    made = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*.gguf")}
    for path, data in made.items():
        path.write_bytes(data[:left if left != 0.5 else len(data) // 2])
    again = both()
    assert len(made) == 2 and again.err.count("the copy is damaged") == 2 and again.out == first.out
    assert {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*.gguf")} == made
    assert "converting" not in both().err


def test_a_conversion_with_damaged_words_is_named(keel, pictured, tmp_path):
    """Whole, but not what keel wrote: the message is of the copy."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    keel("info", pictured, env=env)
    made, = (tmp_path / "cache").rglob("*.gguf")
    made.write_bytes(made.read_bytes().replace(b"gemma3.block_count", b"gemma3.block_cound"))
    assert made.name in keel("info", pictured, env=env, rc=1).err
