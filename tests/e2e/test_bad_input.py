# SPDX-License-Identifier: MIT
"""Bad input: each case must end with exit 1, a message that names the thing, no crash and nothing left behind."""
import random
import resource
import signal
import struct
from dataclasses import replace

import numpy as np
import pytest

import lora
import texts
import tiny_models
from keelcli import train_args, write_rows
from tiny_models import SHAPES, make_weights, write_gguf

BASE = SHAPES["tiny_c"]


@pytest.fixture(scope="module")
def good(tiny_c):
    return tiny_c.read_bytes()


def broken(tmp, data, name="broken.gguf"):
    (tmp / name).write_bytes(data)
    return tmp / name


def at_tensor(data, name):
    """Offset just behind a tensor's name: u32 n_dims, u64 dims[n_dims], u32 type, u64 offset."""
    key = struct.pack("<Q", len(name)) + name.encode()
    return data.index(key) + len(key)


def patch(data, at, fmt, *values):
    raw = struct.pack("<" + fmt, *values)
    return data[:at] + raw + data[at + len(raw):]


# --- GGUF ------------------------------------------------------------------------------------------------------------

def test_missing_empty_folder(keel, tmp_path):
    keel.fails("info", tmp_path / "no.gguf", says="no.gguf")
    keel.fails("info", broken(tmp_path, b""), says="broken.gguf")
    keel.fails("info", broken(tmp_path, b"GGML" + bytes(100)), says="broken.gguf")
    keel.fails("info", tmp_path, says=tmp_path.name)


@pytest.mark.parametrize("share", [0.00002, 0.00006, 0.001, 0.01, 0.02, 0.03, 0.05, 0.3, 0.9, 0.9999])
def test_truncated(keel, good, tmp_path, share):
    f = broken(tmp_path, good[: int(len(good) * share)])
    keel.fails("info", f, says="broken.gguf")
    keel.fails("run", "-m", f, "-p", "a", "-n", 1, says="broken.gguf")


HEADER = {
    "version-1": (4, "I", 1), "version-99": (4, "I", 99), "tensors-huge": (8, "Q", 1 << 62), "tensors-minus": (8, "q", -1),
    "tensors-more": (8, "Q", 10_000), "kvs-huge": (16, "Q", 1 << 61), "kvs-minus": (16, "q", -1), "key-huge": (24, "Q", 1 << 63),
    "key-4G": (24, "Q", 1 << 32), "key-empty": (24, "Q", 0),
}


@pytest.mark.parametrize("case", HEADER)
def test_hostile_header(keel, good, tmp_path, case):
    at, fmt, value = HEADER[case]
    keel.fails("info", broken(tmp_path, patch(good, at, fmt, value)), says="broken.gguf")


TENSOR = {
    "dims-0": (0, "I", 0), "dims-9": (0, "I", 9), "width-0": (4, "Q", 0), "width-huge": (4, "Q", 1 << 62), "rows-huge": (12, "Q", 1 << 62),
    "width-other": (4, "Q", 71), "rows-other": (12, "Q", 73), "offset-far": (24, "Q", 1 << 40), "offset-wraps": (24, "q", -32),
    "offset-unaligned": (24, "Q", 33),
}


@pytest.mark.parametrize("case", TENSOR)
def test_hostile_tensor(keel, good, tmp_path, case):
    off, fmt, value = TENSOR[case]
    at = at_tensor(good, "blk.1.attn_q.weight")
    keel.fails("info", broken(tmp_path, patch(good, at + off, fmt, value)), says=("broken.gguf", "blk.1.attn_q.weight"))


@pytest.mark.parametrize("qtype", [10, 16, 24, 30 + 69, 4, 0xFFFFFFFF])
def test_unknown_quant_type(keel, good, tmp_path, qtype):
    """Q2_K, IQ2_XXS, I8, a type of the future, one that was removed, garbage."""
    at = at_tensor(good, "blk.0.ffn_up.weight")
    keel.fails("info", broken(tmp_path, patch(good, at + 20, "I", qtype)), says=("blk.0.ffn_up.weight", "type"))


def test_duplicate_tensor(keel, good, tmp_path):
    keel.fails("info", broken(tmp_path, good.replace(b"blk.1.attn_k.weight", b"blk.0.attn_k.weight", 1)), says="blk.0.attn_k.weight")


def test_random_damage_never_crashes(keel, good, tmp_path):
    """300 copies with 1 to 8 bytes of the metadata changed: any answer but a crash or a hang."""
    rng, end = random.Random(1), at_tensor(good, "blk.2.post_ffw_norm.weight") + 24
    for i in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        keel("info", broken(tmp_path, bytes(data)), rc=(0, 1))


def remade(tmp, **kw):
    shape = kw.pop("shape", BASE)
    write_gguf(tmp / "broken.gguf", shape, **kw)
    return tmp / "broken.gguf"


def test_wrong_architecture(keel, tmp_path):
    keel.fails("info", remade(tmp_path, arch="llama"), says=("llama", "gemma3"))
    keel.fails("run", "-m", tmp_path / "broken.gguf", "-p", "a", says=("llama", "gemma3"))


def test_no_tokenizer(keel, tmp_path):
    f = remade(tmp_path, skip=("tokenizer.",))
    keel.fails("tokenize", "-m", f, "a", says="tokenizer")
    keel.fails("run", "-m", f, "-p", "a", says="tokenizer")


@pytest.mark.parametrize("key", ["tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.tokens", "gemma3.block_count",
                                 "gemma3.embedding_length", "gemma3.feed_forward_length", "gemma3.attention.head_count",
                                 "gemma3.attention.layer_norm_rms_epsilon"])
def test_missing_key(keel, tmp_path, key):
    keel.fails("run", "-m", remade(tmp_path, skip=(key,)), "-p", "a", says=key)


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight", "blk.2.attn_k_norm.weight"])
def test_missing_tensor(keel, tmp_path, name):
    keel.fails("info", remade(tmp_path, skip=(name,)), says=name)


ABSURD = {
    "no-layers": dict(layers=0), "million-layers": dict(layers=1_000_000), "too-many-layers": dict(layers=4), "no-heads": dict(heads=0),
    "no-kv-heads": dict(kv_heads=0), "kv-over-heads": dict(kv_heads=7), "odd-head": dict(head_dim=23), "no-head": dict(head_dim=0),
    "no-context": dict(context=0), "wide": dict(hidden=1 << 30), "no-width": dict(hidden=0), "no-ff": dict(ff=0),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_metadata(keel, tmp_path, case):
    """The metadata of another shape over the tensors of this one."""
    keel.fails("info", remade(tmp_path, shape=replace(BASE, **ABSURD[case]), weights=make_weights(BASE)), says="broken.gguf")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ["blk.1.attn_norm.weight", "blk.0.attn_q.weight", "token_embd.weight"])
def test_not_a_number_in_weights(keel, tmp_path, name, value):
    weights = make_weights(BASE)
    for i, (n, q, data) in enumerate(weights):
        if n == name:
            d = data.copy()
            flat = d.view(np.float16).ravel() if d.dtype == np.uint8 else d.ravel()
            flat[flat.size // 2] = value
            weights[i] = (n, q, d)
    keel.fails("run", "-m", remade(tmp_path, weights=weights), "-p", "the", "-n", 1, says=name)


def test_not_a_number_in_a_block_scale(keel, tmp_path):
    s = SHAPES["tiny_b"]
    weights = make_weights(s)
    k = next(i for i, (n, q, _) in enumerate(weights) if q == tiny_models.Q.Q4_K)
    n, q, data = weights[k]
    data = data.copy()
    data[0, 0:2] = (0x00, 0x7E)  # f16 NaN as the block's d
    weights[k] = (n, q, data)
    keel.fails("run", "-m", remade(tmp_path, shape=s, weights=weights), "-p", "the", "-n", 1, says=n)


# --- data ------------------------------------------------------------------------------------------------------------

ROW = b'{"prompt": "the", "completion": " sky"}\n'
DATA = {
    "empty": (b"", "d.jsonl"), "blank": (b"\n\n  \n", "d.jsonl"), "not-json": (ROW + b"nonsense\n", ":2"),
    "cut": (ROW + ROW + b'{"prompt": "a", "comp', ":3"), "array": (b"[1, 2]\n", ":1"), "number": (ROW + b"\n7\n", ":3"),
    "no-completion": (ROW + b'{"prompt": "a"}\n', ":2"), "no-prompt": (b'{"completion": "a"}\n', ":1"),
    "completion-number": (b'{"prompt": "a", "completion": 4}\n', ":1"), "empty-completion": (ROW + b'{"prompt": "a", "completion": ""}\n', ":2"),
    "utf8": (ROW + b'{"prompt": "\xff", "completion": "a"}\n', ":2"), "surrogate": (b'{"prompt": "\\ud800", "completion": "a"}\n', ":1"),
    "deep": (b"[" * 100_000 + b"\n", ":1"), "nul": (ROW + b"\x00\n", ":2"),
    "too-long": (ROW + b'{"prompt": "the", "completion": "' + b" stone" * 1200 + b'"}\n', ":2"),
    "messages-empty": (b'{"messages": [], "completion": "a"}\n', ":1"),
    "messages-order": (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "completion": "a"}\n', ":1"),
    "messages-role": (b'{"messages": [{"role": "wizard", "content": "a"}], "completion": "a"}\n', ":1"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_rows_score(keel, tiny_c, tmp_path, case):
    data, where = DATA[case]
    (tmp_path / "d.jsonl").write_bytes(data)
    keel.fails("score", "-m", tiny_c, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "o.jsonl", says=("d.jsonl", where), leaves=tmp_path)


@pytest.mark.parametrize("case", DATA)
def test_bad_rows_train(keel, tiny_c, tmp_path, case):
    data, where = DATA[case]
    (tmp_path / "d.jsonl").write_bytes(data.replace(b', "completion": "a"}', b"}") if "messages" in case else data)
    keel.fails(*train_args(tiny_c, tmp_path / "d.jsonl", tmp_path / "a.gguf", steps=1, rank=2), says=("d.jsonl", where), leaves=tmp_path)


def test_row_above_seq_len(keel, tiny_c, tmp_path):
    rows = write_rows(tmp_path / "d.jsonl", texts.TRAIN[:2] + [{"prompt": "the", "completion": texts.ENGLISH}])
    keel.fails(*train_args(tiny_c, rows, tmp_path / "a.gguf", steps=1, rank=2, seq_len=128), says=(":3", "128"), leaves=tmp_path)


def test_no_assistant_turn(keel, tiny_c, tmp_path):
    rows = write_rows(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    keel.fails(*train_args(tiny_c, rows, tmp_path / "a.gguf", steps=1, rank=2), says=":1", leaves=tmp_path)


def test_missing_data_files(keel, tiny_c, tmp_path):
    keel.fails(*train_args(tiny_c, tmp_path / "no.jsonl", tmp_path / "a.gguf", steps=1), says="no.jsonl", leaves=tmp_path)
    keel.fails("score", "-m", tiny_c, "--data", tmp_path / "no.jsonl", "--out", tmp_path / "o", says="no.jsonl", leaves=tmp_path)
    keel.fails("perplexity", "-m", tiny_c, "--file", tmp_path / "no.txt", says="no.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    keel.fails("perplexity", "-m", tiny_c, "--file", tmp_path / "empty.txt", says="empty.txt")


def test_prompt_above_the_context(keel, tiny_c):
    keel.fails("run", "-m", tiny_c, "-p", "the stone " * 300, "-n", 4, says="context")


# --- adapters --------------------------------------------------------------------------------------------------------

def adapter_case(case, tmp, config, other):
    f = tmp / "bad.gguf"
    a = lora.random_adapter(config, 2, 1, b_std=0.1)
    k = (1, "ffn_up")
    if case == "other-model":
        a = lora.random_adapter(other, 2, 1)
    elif case == "layer-beyond":
        a[99, "attn_q"] = a[0, "attn_q"]
    elif case == "nan":
        a[k][0][0, 0] = np.nan
    elif case == "ranks-differ":
        a[k] = (a[k][0], a[k][1][:, :1].copy())
    elif case == "rows-differ":
        a[k] = (a[k][0], a[k][1][:-1].copy())
    lora.write_gguf(f, a, 4, arch="llama" if case == "arch" else "gemma3")
    data = f.read_bytes()
    if case == "truncated":
        f.write_bytes(data[: len(data) * 2 // 3])
    elif case == "half-pair":
        f.write_bytes(data.replace(b"blk.1.ffn_up.weight.lora_b", b"blk.1.ffn_up.weight.lora_c"))
    elif case == "unknown-module":
        f.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    elif case == "no-alpha":
        f.write_bytes(data.replace(b"adapter.lora.alpha", b"adapter.lora.alphb"))
    elif case == "empty":
        f.write_bytes(b"")
    return f


@pytest.mark.parametrize("case,word", [
    ("other-model", "blk.0"), ("layer-beyond", "99"), ("nan", "ffn_up"), ("ranks-differ", "blk.1.ffn_up"), ("rows-differ", "blk.1.ffn_up"),
    ("arch", "llama"), ("truncated", "bad.gguf"), ("half-pair", "blk.1.ffn_up"), ("unknown-module", "ffn_xx"), ("no-alpha", "alpha"),
    ("empty", "bad.gguf")])
def test_bad_adapter(keel, tiny_c, tiny_a, oracle, tmp_path, case, word):
    f = adapter_case(case, tmp_path, oracle(tiny_c).config, oracle(tiny_a).config)
    rows = write_rows(tmp_path / "d.jsonl", texts.SCORE[:1])
    keel.fails("score", "-m", tiny_c, "--data", rows, "--out", tmp_path / "o.jsonl", "--lora", f, says=word, leaves=tmp_path)
    keel.fails(*train_args(tiny_c, rows, tmp_path / "a.gguf", init_adapter=f, rank=2, alpha=4, steps=1), says=word, leaves=tmp_path)


def test_model_is_no_adapter(keel, tiny_c, tmp_path):
    keel.fails("run", "-m", tiny_c, "-p", "a", "-n", 1, "--lora", tiny_c, says="tiny_c.gguf")
    keel.fails("run", "-m", tiny_c, "-p", "a", "-n", 1, "--lora", tmp_path / "none.gguf", says="none.gguf")


@pytest.mark.parametrize("case", ["no-config", "bad-config", "no-weights", "cut-weights", "dora", "hostile-header"])
def test_bad_peft_folder(keel, tiny_c, oracle, tmp_path, case):
    d = tmp_path / "p"
    lora.write_peft(d, lora.random_adapter(oracle(tiny_c).config, 2, 1), 4)
    cfg, w = d / "adapter_config.json", d / "adapter_model.safetensors"
    if case == "no-config":
        cfg.unlink()
    elif case == "bad-config":
        cfg.write_text('{"r": ')
    elif case == "no-weights":
        w.unlink()
    elif case == "cut-weights":
        w.write_bytes(w.read_bytes()[:-100])
    elif case == "dora":
        cfg.write_text(cfg.read_text().replace('"bias"', '"use_dora": true, "bias"'))
    else:
        w.write_bytes(struct.pack("<Q", 1 << 60) + w.read_bytes()[8:])
    word = "dora" if case == "dora" else "adapter_" + ("config" if "config" in case else "model")
    keel.fails("run", "-m", tiny_c, "-p", "a", "-n", 1, "--lora", d, says=word)


# --- output ----------------------------------------------------------------------------------------------------------

def small_files_only():
    """As a full disk: no file may grow beyond 2 kB. A write then fails with EFBIG instead of ENOSPC."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))


def test_output_cannot_be_created(keel, tiny_c, tmp_path):
    rows = write_rows(tmp_path / "d.jsonl", texts.SCORE[:1])
    for out in (tmp_path / "no" / "such" / "o.jsonl", "/proc/o.jsonl"):
        keel.fails("score", "-m", tiny_c, "--data", rows, "--out", out, says=str(out), leaves=tmp_path)
    keel.fails(*train_args(tiny_c, rows, "/proc/no/a.gguf", steps=1, rank=2), says="/proc/no", leaves=tmp_path)
    (tmp_path / "dir").mkdir()
    keel.fails("score", "-m", tiny_c, "--data", rows, "--out", tmp_path / "dir", says="dir", leaves=tmp_path)
    keel.fails(*train_args(tiny_c, rows, tmp_path / "a.gguf", steps=1, rank=2, log=tmp_path / "no" / "l.jsonl"), says="l.jsonl", leaves=tmp_path)


def test_output_over_an_input(keel, tiny_c, tmp_path):
    """Nothing is read or computed, and no file is touched, where an output is an input, under whatever name, or two outputs are one."""
    rows = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    files = {n: tmp_path / n for n in ("m.gguf", "a.gguf", "v.gguf", "s.yaml")}
    for f in files.values():
        f.write_text("not read")
    m, a, v, study = files.values()
    (tmp_path / "link").symlink_to(v)
    (tmp_path / "sub").mkdir()
    for args in (["train", "-m", m, "--data", f"{rows}:2", "--out", rows], ["train", "-m", m, "--data", rows, "--out", "x.gguf", "--log", rows],
                 ["train", "-m", m, "--data", rows, "--lora", f"{a}:0.5", "--out", a], ["train", "-m", m, "--data", rows, "--init-adapter", a, "--out", a],
                 ["train", "-m", m, "--data", rows, "--out", m], ["quantize", m, "--out", f"{tmp_path}/sub/../m.gguf", "--type", "q8_0"],
                 ["convert", m, "--out", m], ["convert", m, "--out", tmp_path / "new", "--mmproj-out", f"{tmp_path}//sub/../new"],
                 ["merge", "-m", m, "--lora", a, "--out", m], ["merge", "-m", m, "--lora", f"{a}:2", "--out", a],
                 ["export", "-m", m, "--adapter", a, "--out", a], ["score", "-m", m, "--data", rows, "--out", rows],
                 ["capture", "-m", m, "--data", rows, "--out", tmp_path / "new", "--raw", tmp_path / "new"],
                 ["capture", "-m", m, "--data", rows, "--out", v, "--steer", f"{tmp_path / 'link'}:-1.5@1,3-4,op=add"],
                 ["direction", "-m", m, "--data", rows, "--shift", f"{a}:2", "--out", a], ["study", study, "-m", m, "--out", study],
                 ["project", "-m", m, "--direction", v, "--data", rows, "--out", tmp_path / "link"]):
        before = {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        r = keel(*args, rc=2)
        assert "overwrite" in r.err or "one file" in r.err, r
        assert {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before
    # A path that cannot be written is told before the pass, not after it.
    keel.fails("capture", "-m", tiny_c, "--data", rows, "--out", tmp_path / "no" / "x", "--raw", tmp_path / "raw", says="no/x", leaves=tmp_path)
    keel.fails("direction", "-m", tiny_c, "--pairs", rows, "--out", tmp_path / "sub", says="sub: cannot be written", leaves=tmp_path)


def test_disk_full(keel, tiny_c, tmp_path):
    rows = write_rows(tmp_path / "d.jsonl", texts.SCORE + [{"id": i, **r} for i, r in enumerate(texts.TRAIN)])
    r = keel.fails("score", "-m", tiny_c, "--data", rows, "--out", tmp_path / "o.jsonl", says="o.jsonl", leaves=tmp_path,
                   preexec_fn=small_files_only)
    assert r.rc == 1
    keel(*train_args(tiny_c, rows, tmp_path / "a.gguf", steps=1, rank=4), rc=1, preexec_fn=small_files_only)
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p != rows]
    assert not left, left


def test_full_standard_output(keel, tiny_a):
    with open("/dev/full", "wb") as full:
        keel.fails("tokenize", "-m", tiny_a, "--json", "the sky", says="output", stdout=full)
        keel.fails("run", "-m", tiny_a, "-p", "the sky", "-n", 4, "--greedy", says="output", stdout=full)


def test_old_output_survives_a_failure(keel, tiny_c, tmp_path):
    (tmp_path / "a.gguf").write_text("precious")
    (tmp_path / "d.jsonl").write_bytes(ROW + b"nonsense\n")
    keel.fails(*train_args(tiny_c, tmp_path / "d.jsonl", tmp_path / "a.gguf", steps=1, rank=2), says=":2", leaves=tmp_path)
    assert (tmp_path / "a.gguf").read_text() == "precious"
