# SPDX-License-Identifier: MIT
"""make_golden: log-probabilities of the clerk for `keel doctor`, from transformers in fp32 on the dequantised GGUF.

    python make_golden.py models/clerk/clerk.gguf models/clerk/golden.json

Rerun it when the clerk is trained anew; the file names the model it belongs to by the hash that keel computes.
"""
import json
import sys
from pathlib import Path

import numpy as np

from gemma3_ref import load


def fnv(data):
    """64-bit FNV-1a, as keel_hash()."""
    h = 0xcbf29ce484222325
    for b in data:
        h = (h ^ b) * 0x100000001b3 & 0xffffffffffffffff
    return h


def row(ref, ids):
    import torch
    logits = torch.log_softmax(ref.logits(ids).double(), -1)
    return {"ids": ids, "logprobs": [round(float(logits[i - 1, ids[i]]), 6) for i in range(1, len(ids))]}


def main(model, out):
    ref = load(model)
    rng = np.random.default_rng(7)
    vocab = ref.config.vocab_size
    sentence = ref.tok.encode("the clerk counts the colours of three shapes")
    random = [sentence[0]] + [int(i) for i in rng.integers(0, vocab, 95)]  # beyond the window of local layers
    rows = [row(ref, random), row(ref, sentence)]
    Path(out).write_text(json.dumps({"model_hash": f"{fnv(Path(model).read_bytes()):016x}", "rows": rows}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
