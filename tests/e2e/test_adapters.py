# SPDX-License-Identifier: MIT
"""Adapters travel: keel -> llama.cpp, keel -> peft, peft -> keel, GGUF <-> PEFT, with the same log-probs everywhere."""
import numpy as np
import pytest

import lora
import texts
from keelcli import score, train


@pytest.fixture(scope="module", params=["tiny_a", *(pytest.param(m, marks=pytest.mark.full) for m in ("tiny_b", "tiny_c", "real"))])
def trained(request, keel, tiny, tmp_path_factory):
    """(model path, adapter trained by keel)."""
    is_real = request.param == "real"
    model = request.getfixturevalue("real") if is_real else tiny / f"{request.param}.gguf"
    out, _ = train(keel, model, texts.TRAIN, tmp_path_factory.mktemp("t"), steps=6, rank=4, lr=1e-3 if is_real else 1e-2)
    return model, out


def text_logprobs(keel, model, tmp, *o):
    return score(keel, model, [{"id": 0, "prompt": "", "completion": texts.ENGLISH}], tmp, *o)[0]["token_logprobs"]


def test_keel_to_llama_cpp(keel, trained, oracle, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, adapter = trained
    ids = oracle(model).tok.encode(texts.ENGLISH)

    def lp(lora_path):
        ll = llama_cpp.Llama(str(model), n_ctx=512, logits_all=True, verbose=False, n_gpu_layers=0,
                             lora_path=str(lora_path) if lora_path else None)
        ll.eval(ids)
        z = np.array(ll.scores[:len(ids) - 1], np.float64)
        z -= z.max(1, keepdims=True)
        return (z - np.log(np.exp(z).sum(1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]

    noise = np.abs(lp(None) - text_logprobs(keel, model, tmp_path)).mean()  # its f16 cache and 8-bit activations
    there, here = lp(adapter), np.array(text_logprobs(keel, model, tmp_path, "--lora", adapter))
    assert np.abs(there - here).mean() < 2 * noise + 1e-3, noise
    assert np.abs(here - text_logprobs(keel, model, tmp_path)).mean() > 20 * np.abs(there - here).mean()  # the adapter acts


def test_keel_to_peft(keel, trained, oracle, tmp_path):
    from peft import PeftModel
    model, adapter = trained
    keel("export", "-m", model, "--adapter", adapter, "--out", tmp_path / "peft")
    ref = oracle(model)
    pm = PeftModel.from_pretrained(ref.model, str(tmp_path / "peft"))
    try:
        there = ref.logprobs(ref.tok.encode(texts.ENGLISH), pm)
    finally:
        pm.unload()
    assert np.abs(np.subtract(there, text_logprobs(keel, model, tmp_path, "--lora", adapter))).max() < 1e-3
    assert np.abs(np.subtract(there, text_logprobs(keel, model, tmp_path, "--lora", tmp_path / "peft"))).max() < 1e-3
    keel("export", "-m", model, "--adapter", tmp_path / "peft", "--out", tmp_path / "back.gguf")
    a, alpha = lora.read_gguf(adapter)
    b, alpha_b = lora.read_gguf(tmp_path / "back.gguf")
    assert alpha == alpha_b and set(a) == set(b)
    assert all((a[k][h] == b[k][h]).all() for k in a for h in (0, 1))


def test_train_writes_peft(keel, tiny_a, tmp_path):
    """--out without .gguf is a PEFT folder with the same numbers."""
    g, _ = train(keel, tiny_a, texts.TRAIN, tmp_path, "a.gguf", steps=2, rank=4)
    p, _ = train(keel, tiny_a, texts.TRAIN, tmp_path, "folder", steps=2, rank=4)
    (a, alpha), (b, alpha_b) = lora.read_gguf(g), lora.read_peft(p)
    assert alpha == alpha_b and set(a) == set(b) and all((a[k][h] == b[k][h]).all() for k in a for h in (0, 1))


def test_peft_saves_keel_loads(keel, tiny_a, oracle, tmp_path):
    """A folder written by save_pretrained itself, not by our own writer."""
    ref = oracle(tiny_a)
    a = lora.random_adapter(ref.config, 3, 8, ["attn_q", "attn_v", "ffn_up"], b_std=0.05)
    with lora.attached(ref, a, 6) as m:
        m.save_pretrained(str(tmp_path / "p"))
    want = lora.logprobs(ref, a, 6, ref.tok.encode(texts.ENGLISH))
    assert np.abs(np.subtract(want, text_logprobs(keel, tiny_a, tmp_path, "--lora", tmp_path / "p"))).max() < 1e-3


def test_init_from_peft(keel, tiny_a, oracle, tmp_path):
    a = lora.random_adapter(oracle(tiny_a).config, 4, 8, b_std=0.05)
    lora.write_peft(tmp_path / "p", a, 8)
    lora.write_gguf(tmp_path / "g.gguf", a, 8)
    o = dict(steps=2, rank=4, alpha=8, lr=1e-3)
    one, _ = train(keel, tiny_a, texts.TRAIN, tmp_path, "1.gguf", init_adapter=tmp_path / "p", **o)
    two, _ = train(keel, tiny_a, texts.TRAIN, tmp_path, "2.gguf", init_adapter=tmp_path / "g.gguf", **o)
    assert one.read_bytes() == two.read_bytes()
