#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tower.py: the time of an image in keel and in llama.cpp's mtmd, on the same driver and on llama.cpp's own CPU code, as a Markdown table.

    tests/bench/tower.py -m MODEL.gguf --mmproj P.gguf --llama FOLDER [--keel build/src/cli/keel] [--skip-vulkan]

FOLDER holds the npm packages that llama_tower.mjs names. Where 27 blocks would take the peer hours, give it the files that
`tests/oracle/make_full_size.py --layers 1 --vision-layers 1` writes. Idle machine, please.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent


def peer(folder, model, mmproj, image, variant):
    """Seconds of the image, compiling included, and what llama.cpp says it ran on."""
    p = subprocess.run(["node", HERE / "llama_tower.mjs", model, mmproj, image, variant], cwd=folder, text=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.PIPE, env={**os.environ, "GGML_VK_VISIBLE_DEVICES": "0"})
    took = re.findall(r"encoded in (\d+) ms", p.stderr)
    where = re.findall(r"CLIP using (\S+) backend", p.stderr)
    if not took: # what comes after the image is not our concern
        sys.exit(p.stderr + "\nllama.cpp failed")
    if where != (["Vulkan0"] if variant == "vulkan" else ["CPU"]):
        sys.exit(f"llama.cpp ran on {where}, not as told")
    return int(took[0]) / 1e3, where[0]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-m", "--model", required=True, type=Path)
    p.add_argument("--mmproj", required=True, type=Path)
    p.add_argument("--llama", required=True, type=Path)
    p.add_argument("--keel", type=Path, default=HERE.parent.parent / "build/src/cli/keel")
    p.add_argument("--size", type=int, default=896)
    p.add_argument("--skip-vulkan", action="store_true", help="only llama.cpp's CPU code")
    a = p.parse_args()
    k = json.loads(subprocess.run([a.keel.resolve(), "bench", "-m", a.model, "--mmproj", a.mmproj, "--json", "--quiet", "--prompt-tokens", "0", "-n", "0",
                                   "--rows", "0", "--repeats", "2"], check=True, text=True, stdout=subprocess.PIPE).stdout)
    own = min(ph["seconds"] for ph in k["phases"] if ph["phase"] == "image")
    print(f"{date.today()}, {k['device']}, {k['driver']}; measured peaks {k['peak_gflops']:.1f} GFLOP/s, {k['peak_gbps']:.1f} GB/s\n")
    print("| an image | s | keel's time, times |\n|---|---|---|")
    print(f"| keel | {own:.2f} | 1 |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "i.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (a.size, a.size, 3), dtype=np.uint8)).save(image)
        for variant in ["default"] + ([] if a.skip_vulkan else ["vulkan"]):
            s, where = peer(a.llama, a.model.resolve(), a.mmproj.resolve(), image, variant)
            print(f"| llama.cpp, {where} | {s:.2f} | {s / own:.1f} |", flush=True)


main()
