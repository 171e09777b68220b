# SPDX-License-Identifier: MIT
"""make_fixtures: expected values of the real 270M, from transformers and peft in fp32 on the dequantised GGUF.

    python make_fixtures.py MODEL.gguf [OUT.json]     default out: fixtures/g270.json, about 10 minutes on 2 cores

Tiny models need no committed values: their tests ask the oracle at run time.
"""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

import lora
import texts
from gemma3_ref import load

LORA = {"rank": 4, "alpha": 8, "seed": 270, "b_std": 0.02, "lr": 1e-3, "batch": 2, "steps": 5}
HERE = Path(__file__).parent


def rounded(xs):
    return [round(float(x), 5) for x in xs]


def probe(shape, key):
    """A fixed random direction: a gradient off by e (relative, in any direction) moves its projection by about e x norm."""
    return np.random.default_rng([*key]).standard_normal(shape)


def gradient_digest(grads):
    out = {}
    for (layer, t), (ga, gb) in grads.items():
        for half, g in (("a", ga), ("b", gb)):
            key = (layer, lora.TARGETS.index(t), half == "b")
            out[f"blk.{layer}.{t}.{half}"] = [float(f"{np.linalg.norm(g):.6g}"), float(f"{(g * probe(g.shape, key)).sum():.6g}")]
    return out


def greedy_case(ref, prompt, n):
    import torch
    ids, gaps = ref.tok.encode(prompt), []
    start = len(ids)
    for _ in range(n):
        top = torch.topk(ref.logits(ids)[-1], 2)
        gaps.append(float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return {"prompt": prompt, "ids": ids[start:], "gaps": rounded(gaps),
            "why": "ids must agree up to the first gap below 0.02: f32 summation order moves logits by about 1e-4"}


def lora_case(ref):
    p = LORA
    adapter = lora.random_adapter(ref.config, p["rank"], p["seed"], b_std=p["b_std"])
    rows = texts.TRAIN[:p["batch"] * p["steps"]]
    steps = [rows[i:i + p["batch"]] for i in range(0, len(rows), p["batch"])]
    r = lora.train(ref, adapter, p["alpha"], steps, [p["lr"]] * p["steps"])
    return {**p, "rows": rows, "loss": r["loss"], "grad_norm": r["grad_norm"], "grads": gradient_digest(r["grads"]),
            "why": "losses within 1 % (design.md section 7); gradients: norm [0] and projection [1] on probe()"}


def main():
    path = sys.argv[1]
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / "fixtures" / "g270.json"
    ref = load(path)
    tok = ref.tok
    fx = {"model": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "logprobs": []}
    fx["logprobs_why"] = "mean |d| < 0.01 (design.md section 7): both sides fp32, only summation order differs"
    for name in ("ENGLISH", "CODE", "MULTI", "NUMBERS", "LONG"):
        ids = tok.encode(getattr(texts, name))
        fx["logprobs"].append({"text": name, "ids": ids, "logprobs": rounded(ref.logprobs(ids))})
        print(name, len(ids), np.mean(fx["logprobs"][-1]["logprobs"]), flush=True)
    ppl, nll, n = ref.perplexity(texts.LONG, 256)
    fx["perplexity"] = {"text": "LONG", "ctx": 256, "ppl": ppl, "nll": nll, "n_tokens": n}
    fx["score"] = []
    for row in texts.SCORE:
        p, c = tok.encode(row["prompt"]), tok.encode(row["completion"], bos=False)
        lp = ref.logprobs(p + c)[len(p) - 1:]
        fx["score"].append({"id": row["id"], "token_ids": c, "token_logprobs": rounded(lp), "logprob": sum(lp)})
    fx["tokenizer"] = [{"text": t, "plain": tok.encode(t), "special": tok.encode(t, special=True)} for t in texts.TOKENIZER]
    fx["greedy"] = [greedy_case(ref, p, 16) for p in ("The capital of France is", "1, 2, 3, 4, 5,", "Once upon a time")]
    print("lora", flush=True)
    fx["lora"] = lora_case(ref)
    print(fx["perplexity"], fx["lora"]["loss"], fx["lora"]["grad_norm"])
    out.write_text(json.dumps(fx, ensure_ascii=True, separators=(",", ":")).replace('},{', '},\n{') + "\n")


if __name__ == "__main__":
    main()
