# SPDX-License-Identifier: MIT
"""merge: the merged model scores as the model with its adapters; weights against numpy and gguf-py."""
import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

import lora
from keelcli import score

ROWS = [{"id": "a", "prompt": "the clerk counts the red stones", "completion": " and then the clerk writes the number in the book."}]


def adapter(ref, path, form, rank, seed, alpha=6):
    a = lora.random_adapter(ref.config, rank, seed, b_std=0.05)
    (lora.write_gguf if form == "gguf" else lora.write_peft)(path, a, alpha)
    return a


@pytest.mark.parametrize("form", ["gguf", "peft"])
def test_scores_as_with_the_adapters(keel, tiny_a, oracle, tmp_path, form):
    ref = oracle(tiny_a)
    one, two = tmp_path / ("one.gguf" if form == "gguf" else "one"), tmp_path / "two.gguf"
    adapter(ref, one, form, 3, 5)
    adapter(ref, two, "gguf", 8, 6)
    for options in (["--lora", one], ["--lora", f"{one}:0.5", "--lora", f"{two}:-0.25"]):
        keel("merge", "-m", tiny_a, *options, "--out", tmp_path / "m.gguf")
        want = score(keel, tiny_a, ROWS, tmp_path, *options)[0]["token_logprobs"]
        got = score(keel, tmp_path / "m.gguf", ROWS, tmp_path)[0]["token_logprobs"]
        assert np.abs(np.subtract(got, want)).max() < 1e-4
    plain = score(keel, tiny_a, ROWS, tmp_path)[0]["token_logprobs"]
    assert np.abs(np.subtract(got, plain)).max() > 1e-2  # the adapters do something


@pytest.mark.parametrize("kind", [None, "q8_0", "f16"])
def test_weights(keel, tiny, oracle, tmp_path, kind):
    """tiny_b has every type; those that gguf-py can quantise must come out bit for bit, but for values on a rounding edge."""
    path = tiny / "tiny_b.gguf"
    a = adapter(oracle(path), tmp_path / "a.gguf", "gguf", 4, 9, alpha=8)
    keel("merge", "-m", path, "--lora", tmp_path / "a.gguf", "--out", tmp_path / "m.gguf", *(["--type", kind] if kind else []))
    got = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors}
    was = gguf.GGUFReader(str(path)).tensors
    assert [t.name for t in was] == list(got)
    for t in was:
        new = got[t.name]
        if "blk." not in t.name or "norm" in t.name:
            if kind is None or "norm" in t.name:
                assert new.data.tobytes() == t.data.tobytes(), t.name
            continue
        _, layer, part, _ = t.name.split(".")
        A, B = a[int(layer), part]
        w = gguf.quants.dequantize(t.data, t.tensor_type) if t.tensor_type != Q.F32 else t.data
        w = w + 2.0 * (B.astype(np.float64) @ A)
        x = gguf.quants.dequantize(new.data, new.tensor_type) if new.tensor_type != Q.F32 else new.data
        assert new.tensor_type == (Q[kind.upper()] if kind else t.tensor_type)
        # Half a step of the coarsest type is a 16th of the block's range.
        step = {Q.F16: 1e-3, Q.BF16: 8e-3, Q.Q8_0: 0.01}.get(new.tensor_type, 0.13)
        assert np.abs(x - w).max() < step * np.abs(w).max(), t.name
        if new.tensor_type in (Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_0):
            same = gguf.quants.quantize(w.astype(np.float32), new.tensor_type).ravel() == np.asarray(new.data).ravel().view(
                np.float16 if new.tensor_type == Q.F16 else np.uint8)
            assert same.mean() > 0.98, t.name


def test_folder(keel, tiny, oracle, tiny_a, tmp_path):
    adapter(oracle(tiny_a), tmp_path / "a.gguf", "gguf", 3, 5)
    for name, model in (("x", tiny / "tiny_a_hf"), ("y", tiny_a)):
        keel("merge", "-m", model, "--lora", tmp_path / "a.gguf", "--out", tmp_path / f"{name}.gguf")
    x, y = (score(keel, tmp_path / f"{n}.gguf", ROWS, tmp_path)[0]["token_logprobs"] for n in "xy")
    assert np.abs(np.subtract(x, y)).max() < 1e-4


def test_bad_input(keel, tiny, oracle, tiny_a, tiny_c, tmp_path):
    out = tmp_path / "m.gguf"
    adapter(oracle(tiny_c), tmp_path / "c.gguf", "gguf", 3, 5)
    a = adapter(oracle(tiny_a), tmp_path / "a.gguf", "gguf", 3, 5)
    keel.fails("merge", "-m", tiny_a, "--lora", tmp_path / "c.gguf", "--out", out, says="c.gguf")
    keel.fails("merge", "-m", tiny_a, "--lora", tmp_path / "no.gguf", "--out", out, says="no.gguf")
    keel.fails("merge", "-m", tiny_a, "--lora", f"{tmp_path}/a.gguf:inf", "--out", out, says="scale")
    keel.fails("merge", "-m", tiny_a, "--lora", tmp_path / "a.gguf", "--out", out, "--type", "q9", says="q4_k_m")
    keel.fails("merge", "-m", tiny_a, "--lora", tmp_path / "a.gguf", "--out", tiny_a, says="overwrite", rc=2)
    keel("merge", "-m", tiny_a, "--out", out, rc=2)
    a[0, "attn_q"][0][0, 0] = float("nan")
    lora.write_gguf(tmp_path / "nan.gguf", a, 6)
    keel.fails("merge", "-m", tiny_a, "--lora", tmp_path / "nan.gguf", "--out", out, says="nan.gguf")
    a[0, "attn_q"][0][0, 0] = 1e38  # finite, but not with B: the sum must not become infinity in silence
    a[0, "attn_q"][1][:] = 1e10
    lora.write_gguf(tmp_path / "big.gguf", a, 6)
    keel.fails("merge", "-m", tiny_a, "--lora", tmp_path / "big.gguf", "--out", out, says="attn_q")
    assert not out.exists()
