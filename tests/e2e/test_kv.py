# SPDX-License-Identifier: MIT
"""--kv: caches that hold keys and values as f16 or q8_0, against f32 ones."""
import json

import numpy as np
import pytest

import texts
from keelcli import score, write_rows

ROW = [{"id": "long", "prompt": "", "completion": texts.ENGLISH}]
PACKED = ("f16", "q8_0")


def differences(a, b):
    return np.abs(np.subtract(a[0]["token_logprobs"], b[0]["token_logprobs"]))


# In parts of 16 tokens the row goes through the cache, whose ring wraps. What a key and a value are off by is 2^-12 of each for f16 and
# up to 1/254 of the largest of 32 for q8_0, that is some 20 times as much; random weights carry it to the logits. Twice what was
# measured, and well above rounding in f32.
@pytest.mark.parametrize("kv, least, most", [("f16", 1e-6, 4e-3), ("q8_0", 1e-4, 1e-1)])
def test_score(keel, tiny_a, tmp_path, kv, least, most):
    want = score(keel, tiny_a, ROW, tmp_path, "--batch-tokens", 16)
    d = differences(score(keel, tiny_a, ROW, tmp_path, "--batch-tokens", 16, "--kv", kv), want)
    print(kv, "mean |d|", d.mean(), "max", d.max())
    assert least < d.max() < most
    (tmp_path / "t.txt").write_text(texts.ENGLISH)
    a, b = (keel("perplexity", "-m", tiny_a, "--file", tmp_path / "t.txt", "--ctx", 64, "--batch-tokens", 16, "--kv", t, "--json").json["nll"]
            for t in ("f32", kv))
    assert 0 < abs(a - b) < most


def test_rows_that_need_no_cache_stay_as_they_are(keel, tiny_a, tmp_path):
    assert score(keel, tiny_a, ROW, tmp_path, "--kv", "q8_0") == score(keel, tiny_a, ROW, tmp_path)


def test_plan_and_run(keel, tiny_a, tmp_path):
    size = {}
    for kv in ("f32",) + PACKED:
        plan = keel("info", tiny_a, "--kv", kv, "--json").json["plan_run"]
        size[kv] = next(r["bytes"] for r in plan["rows"] if r["what"] == "kv cache")
        j = keel("run", "-m", tiny_a, "-p", texts.ENGLISH[:80], "-n", 4, "--greedy", "--json", "--kv", kv).json
        assert len(j["ids"]) == 4 or j["stop"] == "end"
    assert size["f32"] > size["f16"] > size["q8_0"]
    j = keel("bench", "-m", tiny_a, "--prompt-tokens", 8, "-n", 2, "--context", 40, "--rows", 0, "--repeats", 2, "--kv", "f16", "--json").json
    assert j["kv"] == "f16" and j["context"] == 40 and j["phases"][1]["tokens"] == 2


def test_not_offered(keel, tiny_a, tmp_path):
    keel.fails("run", "-m", tiny_a, "-p", "x", "--kv", "q4_0", says="f32, f16, q8_0", rc=2)
    rows = write_rows(tmp_path / "t.jsonl", texts.TRAIN)
    keel.fails("train", "-m", tiny_a, "--data", rows, "--out", tmp_path / "o", "--kv", "f16", says="--kv", rc=2)


def test_study(keel, tiny_c, tmp_path):
    write_rows(tmp_path / "t.jsonl", texts.TRAIN[:4])
    write_rows(tmp_path / "k.jsonl", [{"id": "a", "domain": "d", "prompt": "the grass is"}])
    text = "name: n\ntrain: {data: [{file: t.jsonl}], steps: 1, batch: 2}\neval: {kl: k.jsonl, answer_tokens: 4, kv: KV}\n"
    (tmp_path / "s.yaml").write_text(text.replace("KV", "f16"))
    keel("study", tmp_path / "s.yaml", "-m", tiny_c, "--out", tmp_path / "o")
    assert json.loads((tmp_path / "o/manifest.json").read_text())["precision"].endswith("cached keys and values in f16")
    (tmp_path / "s.yaml").write_text(text.replace("KV", "bf16"))
    keel.fails("study", tmp_path / "s.yaml", "-m", tiny_c, "--out", tmp_path / "p", says=["s.yaml:3", "f32, f16 or q8_0"])


# docs/numerics.md: 1197 and 2025 tokens of other text had means of 6e-4 and 0.028, largest 0.013 and 0.37. LONG lies beyond the window of
# 512; the bounds leave a factor of four, for drivers that round another way.
@pytest.mark.full
@pytest.mark.parametrize("kv, mean, most", [("f16", 0.003, 0.05), ("q8_0", 0.12, 1.5)])
def test_real(keel, real, tmp_path, kv, mean, most):
    row = [{"id": "long", "prompt": "", "completion": texts.LONG}]
    d = differences(score(keel, real, row, tmp_path, "--kv", kv), score(keel, real, row, tmp_path))
    print(kv, len(d), "tokens, mean |d|", d.mean(), "max", d.max(), "beyond the window: mean", d[512:].mean(), "max", d[512:].max())
    assert len(d) > 600 and d.mean() < mean and d.max() < most and d[512:].mean() < mean
