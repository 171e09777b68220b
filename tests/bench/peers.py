#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""peers.py: keel and its peers on the same driver, one after the other, as a Markdown table for docs/benchmarks.md.

    tests/bench/peers.py -m MODEL.gguf [--keel build/src/cli/keel] [--llama FOLDER] [--torch]

--llama FOLDER: llama.cpp with Vulkan from the npm packages installed there (llama_cpp.mjs says which). --torch: LoRA training with
peft in fp32 on PyTorch's CPU backend, same rank, targets and row. Idle machine, please: other load makes the ratios meaningless.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(argv, env=None, cwd=None):
    p = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, text=True, cwd=cwd, env={**os.environ, **(env or {})})
    if p.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, argv))}")
    return json.loads(p.stdout.strip().splitlines()[-1]) if p.stdout.strip() else {}


def torch_train(model, rank, n_tokens, steps):
    """Tokens a second of one optimiser step of a single row, the first step not counted."""
    sys.path.insert(0, str(HERE.parent / "oracle"))
    import torch
    import gemma3_ref
    import lora
    ref = gemma3_ref.load(str(model))
    ids = torch.tensor([[2 + i % 1000 for i in range(n_tokens)]])
    with lora.attached(ref, lora.random_adapter(ref.config, rank, 1), rank) as m:
        opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        took = []
        for _ in range(steps + 1):
            start = time.monotonic()
            z = m(input_ids=ids).logits[0, :-1]
            torch.nn.functional.cross_entropy(z, ids[0, 1:]).backward()
            opt.step()
            opt.zero_grad()
            took.append(time.monotonic() - start)
    return n_tokens / min(took[1:])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("-m", "--model", required=True, type=Path)
    p.add_argument("--keel", type=Path, default=HERE.parent.parent / "build/src/cli/keel")
    p.add_argument("--llama", type=Path)
    p.add_argument("--torch", action="store_true")
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--decode", type=int, default=8)
    p.add_argument("--peer-decode", type=int, default=2, help="tokens that the peer decodes: it may take seconds for each")
    p.add_argument("--row", type=int, default=128)
    p.add_argument("--rank", type=int, default=16)
    a = p.parse_args()
    model = a.model.resolve()
    k = run([a.keel.resolve(), "bench", "-m", model, "--json", "--quiet", "--prompt-tokens", a.prompt, "-n", a.decode, "--seq-len", a.row,
             "--rank", a.rank, "--repeats", 2])
    own = {ph["phase"]: ph["tokens_per_second"] for ph in k["phases"]}
    print(f"{date.today()}, {k['device']}, {k['driver']}; measured peaks {k['peak_gflops']:.1f} GFLOP/s, {k['peak_gbps']:.1f} GB/s; longest "
          f"submission {k['longest_submit_ms']:.0f} ms; `tests/bench/peers.py -m {model.name}`\n")
    rows = [(f"prefill, {a.prompt} tokens", own["prefill"], {}), ("decode", own["decode"], {}),
            (f"training, rank {a.rank}, all projections, one row of {a.row}", own["train"], {})]
    if a.llama:
        r = run(["node", HERE / "llama_cpp.mjs", model, a.prompt, a.peer_decode], cwd=a.llama, env={"GGML_VK_VISIBLE_DEVICES": "0"})
        rows[0][2]["llama.cpp Vulkan"], rows[1][2]["llama.cpp Vulkan"] = r["prefill"], r["decode"]
        print(f"llama.cpp ran on {', '.join(r['device'])}.\n")
    if a.torch:
        rows[2][2]["PyTorch CPU, peft, fp32"] = torch_train(model, a.rank, a.row, 2)
    print("| what | keel, tokens/s | peer | tokens/s | ratio |\n|---|---|---|---|---|")
    for what, mine, peers in rows:
        for name, theirs in (peers or {"": None}).items():
            print(f"| {what} | {mine:.2f} | {name} | " + (f"{theirs:.3g} | {mine / theirs:.1f} |" if theirs else "| |"))


main()
