#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""shader_table.py: what every shader costs on a GPU, as AMD's compiler sees it, as docs/shaders.md.

    tests/shader_table.py PATH/shader-stats [--family navi21,navi31] [--glslang PATH] > docs/shaders.md

Reads the list of modules from shaders/meson.build, compiles each as the build does and hands it to shader-stats (a program that
runs RADV's compiler without a GPU). Exits 1 if any shader spills registers or uses scratch memory. Variants for CPU drivers
(names with _x) are left out: they never run on a GPU. Those on cooperative matrices need glslang 14 or newer and a GPU that has
them: navi31 stands in, at its own subgroup size of 64.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Specialisation constants as src/ops sets them on a GPU; constant 0 is the local size, 64 elsewhere. One entry a use.
USES = {
    "linear_fwd": {"1 token": [512, 1, 1, 8, 0], "8 tokens": [64, 2, 8, 1, 0], "1 token, three with LoRA": [512, 1, 1, 8, 0, 3, 0, 1],
                   "1 token, gate and up": [512, 2, 1, 8, 0, 2, 1, 0], "8 tokens, gate and up": [64, 2, 8, 1, 0, 2, 1, 0]},
    "linear_fwd_dot": {"1 token": [512, 1, 1, 8, 0, 1, 0, 0, 20], "1 token, gate and up": [512, 2, 1, 8, 0, 2, 1, 0, 20]},
    "linear_bwd": {"1 token": [64, 1], "4 tokens": [64, 4]},
    "lora_reduce": {"1 token": [64, 64, 1], "64 tokens": [64, 1, 1], "64 tokens, B": [64, 1, 2], "64 tokens, odd sizes": [64, 1, 0]},
    "lora_expand": {"8 tokens": [64, 8, 2], "8 tokens, A": [64, 8, 3], "8 tokens, odd rank": [64, 8, 0]},
    "lora_outer": {"": [64, 0]},
    "sumsq": {"": [64, 1]},
    "move_rows": {"gather": [64, 0], "scatter": [64, 1]},
    "attn_mix": {"head of 256": [64, 4]},
    **{f"linear_coop_{way}": {
        "128 × 128, pairs": [512, 16, 16, 16, 2, 4, 4, 2, 1, 1], "128 × 128, single": [512, 16, 16, 16, 2, 4, 4, 2, 0, 1],
        "32 × 64, pairs": [128, 16, 16, 16, 1, 2, 2, 2, 1, 1]} for way in ("fwd", "bwd")},
    "attn_keys_bwd": {"head of 256": [64, 4]},
}


def modules():
    """[(module name, source, [define])] of shaders/meson.build, by reading its three kinds of lists."""
    text = (ROOT / "shaders/meson.build").read_text()
    out = []
    types = re.search(r"foreach t : \[(.*?)\]", text).group(1).replace("'", "").split(", ")
    for name, source, defines in re.findall(r"\['([A-Za-z_0-9]+)'(?: \+ t)?, '([a-z_/0-9]+\.comp)', \[(.*?)\]\]", text):
        per_type = "+ t" in defines
        words = [w.strip(" '") for w in defines.split(",") if w.strip() and "+ t" not in w]
        for t in types if per_type else [None]:
            out.append((name + t if t else name, source, words + ([f"Q_{t}"] if t else [])))
    for listed, rest in re.findall(r"foreach s : \[(.*?)\]\n(.*?)endforeach", text, re.S):
        x = "EXCHANGE" in rest
        for s in re.findall(r"'([a-z_/0-9]+)'", listed):
            out.append((s.split("/")[1] + ("_x" if x else ""), s + ".comp", ["EXCHANGE"] if x else []))
    return [m for m in out if "EXCHANGE" not in m[2]]


def uses_of(name):
    for prefix, uses in USES.items():
        if name == prefix or name.startswith(prefix + "_") and name[len(prefix) + 1:].isupper() or \
                re.fullmatch(prefix + r"_[A-Z0-9_]+", name):
            return uses
    return {"": [64]}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("shader_stats")
    p.add_argument("--family", default="navi21")
    p.add_argument("--glslang", default="glslangValidator")
    a = p.parse_args()
    rows, driver = [], ""
    with tempfile.TemporaryDirectory() as tmp:
        for name, source, defines in modules():
            spv = f"{tmp}/{name}.spv"
            subprocess.run([a.glslang, "--target-env", "vulkan1.1", "-S", "comp", f"-I{ROOT}/shaders",
                            *[f"-D{d}" for d in defines], "-o", spv, ROOT / "shaders" / source], check=True, stdout=subprocess.DEVNULL)
            for use, spec in uses_of(name).items():
                flags = [x for i, v in enumerate(spec) for x in ("-s", f"{i}={v}")]
                coop = "linear_coop" in name
                flags += ["-r", "64", "--full-subgroups"] if coop else []
                r = subprocess.run([a.shader_stats, "-f", "navi31" if coop else a.family, "--json", *flags, spv], capture_output=True, text=True)
                for s in json.loads(r.stdout or "[]"):
                    if "error" in s or r.returncode:
                        sys.exit(f"{name}: {s.get('error', r.stderr)}")
                    driver = s["driver"]
                    rows.append((name, use, s))
    print("# Shaders on a GPU\n")
    print(f"What AMD's compiler makes of each shader ({driver}, ACO, without a GPU), with the specialisation constants that keel uses on one.")
    print("Variants for CPU drivers are left out. `VGPRs`: vector registers a lane; `waves`: how many fit on a SIMD; `cycles`: inverse throughput of")
    print("64 lanes with the compiler's own guesses of trip counts, so it compares versions of a shader, not shaders. Made by `tests/shader_table.py`.\n")
    print("| shader | use | GPU | VGPRs | spilled | scratch | shared | code | waves | cycles |\n|---|---|---|---|---|---|---|---|---|---|")
    bad = 0
    for name, use, s in rows:
        spilled = s["spilled_vgprs"] + s["spilled_sgprs"]
        bad += spilled > 0 or s["scratch_bytes"] > 0
        print(f"| {name} | {use} | {s['family']} | {s['vgprs']} | {spilled} | {s['scratch_bytes']} | {s['lds_bytes']} | {s['code_bytes']} "
              f"| {s['waves_per_simd']} | {s['inverse_throughput']} |")
    print(f"\n{len(rows)} programs, {bad} that spill or use scratch memory.")
    return 1 if bad else 0


sys.exit(main())
