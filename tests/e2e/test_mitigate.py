# SPDX-License-Identifier: MIT
"""What keeps a training run from drifting, each against the same in PyTorch: layer masks."""
import json

import numpy as np
import pytest

import lora
import texts
from keelcli import score, train, train_args, write_rows
from test_train import ALPHA, LR, RANK, same_adapter, same_losses, start, steps_of


def test_layers(keel, tiny_a, oracle, tmp_path):
    """Only the named layers get an adapter, and they learn what autograd makes them learn."""
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path)
    only = {k: v for k, v in init.items() if k[0] in (1, 3)}
    lora.write_gguf(tmp_path / "init.gguf", only, ALPHA)
    out, log = train(keel, tiny_a, texts.TRAIN[:6], tmp_path, **opts, batch=2, steps=3, layers="1,3")
    want = lora.train(ref, only, ALPHA, steps_of(texts.TRAIN[:6], 2), [LR] * 3)
    same_losses(log, want)
    same_adapter(lora.read_gguf(out)[0], want["adapter"], only)


def test_layers_as_peft_has_them(keel, tiny_a, oracle, tmp_path):
    from peft import PeftModel
    out, _ = train(keel, tiny_a, texts.TRAIN[:4], tmp_path, "folder", steps=4, rank=4, lr=1e-2, layers="2-3")
    assert json.loads((out / "adapter_config.json").read_text())["layers_to_transform"] == [2, 3]
    ref = oracle(tiny_a)
    pm = PeftModel.from_pretrained(ref.model, str(out))
    try:
        there = ref.logprobs(ref.tok.encode(texts.ENGLISH), pm)
    finally:
        pm.unload()
    here = score(keel, tiny_a, [{"id": 0, "prompt": "", "completion": texts.ENGLISH}], tmp_path, "--lora", out)[0]["token_logprobs"]
    assert np.abs(np.subtract(there, here)).max() < 1e-3


def test_layers_in_the_plan(keel, tiny_a):
    plan = lambda *o: {r["what"]: r["bytes"] for r in keel("info", tiny_a, "--rank", 8, "--json", *o).json["plan_train"]["rows"]}
    n_layers = keel("info", tiny_a, "--json").json["n_layers"]
    assert n_layers * plan("--layers", "2")["AdamW moments"] == plan()["AdamW moments"]


@pytest.mark.parametrize("layers,says", [("9", "no layer 9"), ("3-1", "range"), ("x", "not understood")])
def test_bad_layers(keel, tiny_a, tmp_path, layers, says):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    keel.fails(*train_args(tiny_a, data, tmp_path / "a.gguf", steps=1, layers=layers), says=says, leaves=tmp_path)
