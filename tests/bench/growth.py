#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""growth.py: how time grows with context, rows, rank and layers, as a Markdown table for docs/benchmarks.md.

    tests/bench/growth.py -m MODEL.gguf [--keel build/src/cli/keel] [--kv f16] [--only context,rows,rank,layers]

MODEL gives the tokenizer for random weights in the 270M's shapes: six layers of them (five local, one global), or as many as are varied
(tests/oracle/make_full_size.py). What counts is the processor time of keel's process: on a software driver that is the work itself, and other
load of the machine changes it by tens of percent, not many times over as it does the time on the clock. On a GPU give --clock.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAIN = ("-n", 0, "--seq-len", 128)
DECODE = ("-n", 8, "--rows", 0)
# What is varied: title, layers of the model, values, options of `keel bench` for a value.
SERIES = {
    "context": [("decode of a token, context", 6, (128, 512, 2048, 8192, 16384), lambda v: (*DECODE, "--context", v))],
    "rows": [("training step, rows of 128", 6, (1, 2, 4), lambda v: (*TRAIN, "--rows", v))],
    "rank": [("training step of a row of 128, rank", 6, (4, 16, 64, 256), lambda v: (*TRAIN, "--rank", v))],
    "layers": [("decode of a token at 128, layers", None, (6, 12, 24), lambda v: (*DECODE, "--context", 128)),
               ("training step of a row of 128, rank 16, layers", None, (6, 12, 24), lambda v: TRAIN)],
}


def make_model(tokenizer, layers, folder):
    path = Path(folder) / f"{layers}.gguf"
    if not path.exists():
        subprocess.run([sys.executable, HERE.parent / "oracle/make_full_size.py", "--shape", "270m", "--layers", str(layers), "--tokenizer",
                        tokenizer, "--out", path], check=True)
    return path


def bench(a, model, options):
    """Seconds of one token of decode or one training step, and the whole answer."""
    argv = [a.keel, "bench", "-m", model, "--json", "--quiet", "--no-ops", "--prompt-tokens", 0, "--repeats", a.repeats, "--kv", a.kv, *options]
    p = subprocess.run([str(x) for x in argv], stdout=subprocess.PIPE, text=True)
    if p.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, argv))}")
    j = json.loads(p.stdout)
    phase = j["phases"][0]
    return phase["seconds" if a.clock else "cpu_seconds"] / (phase["tokens"] if phase["phase"] == "decode" else 1), j


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-m", "--model", required=True, type=Path)
    p.add_argument("--keel", type=Path, default=HERE.parent.parent / "build/src/cli/keel")
    p.add_argument("--kv", default="f32")
    p.add_argument("--only", default=",".join(SERIES))
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--clock", action="store_true", help="time on the clock, for an idle machine")
    a = p.parse_args()
    headed = False
    with tempfile.TemporaryDirectory() as tmp:
        for title, layers, values, options in (s for name in a.only.split(",") for s in SERIES[name]):
            before = None
            for v in values:
                seconds, j = bench(a, make_model(a.model, layers or v, tmp), options(v))
                if not headed:
                    print(f"{date.today()}, {j['device']}, {j['driver']}; `tests/bench/growth.py -m {a.model.name}`; keys and values {a.kv}; "
                          f"{'time on the clock' if a.clock else 'processor time'}, best of {a.repeats}\n")
                    print("| what | at | ms | times the one before | value times |\n|---|---|---|---|---|")
                    headed = True
                growth = f"{seconds / before[1]:.2f} | {v / before[0]:g}" if before else "|"
                print(f"| {title} | {v} | {1e3 * seconds:.1f} | {growth} |", flush=True)
                before = v, seconds


main()
