# SPDX-License-Identifier: MIT
"""Hooks in the vision tower: steering and captures against forward hooks on transformers' SiglipVisionModel, image tokens as a set of
positions in the language model."""
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from keelcli import train_args, write_rows
from test_images import ROWS, check, files, make_pair, run_score, with_folder  # noqa: F401 (make_pair is a fixture)
from test_steer import hooked, options, vector

SOME = [r for r in ROWS if "images" in r][:4]


def tower_of(vlm):
    return vlm.model.model.vision_tower


def blocks(tower):
    return tower.vision_model.encoder.layers if hasattr(tower, "vision_model") else tower.encoder.layers


def module_at(tower, site, layer):
    block = blocks(tower)[layer]
    return {"tower.pre": block, "tower.post": block, "tower.attn": block.self_attn, "tower.mlp": block.mlp}[site]


def tower_hooked(tower, hooks):
    """A tower's hooks are for all patches: `at` is all or image."""
    return hooked(tower, [(*h[:5], "all") for h in hooks], module_at=module_at)


def mixture(d, last):
    return [("tower.pre", 0, "add", vector(1, d), 0.3, "all"), ("tower.attn", 0, "ablate", vector(2, d, 2), 0, "all"),
            ("tower.mlp", 1, "cap", vector(3, d), -0.2, "image"), ("tower.attn", last, "floor", vector(4, d), 0.4, "all"),
            ("tower.mlp", last, "add", vector(5, d), -0.5, "all"), ("tower.post", last, "ablate", vector(6, d), 0, "all")]


@pytest.mark.parametrize("name", ["tiny_a", "tiny_d"])
def test_log_probs(keel, make_pair, tmp_path, name):
    pair = make_pair(name)
    tower = tower_of(pair[2])
    hooks = mixture(tower.config.hidden_size, len(blocks(tower)) - 1)
    plain = run_score(keel, pair, SOME)
    for given in [[h] for h in hooks] + [hooks]:
        got = run_score(keel, pair, SOME, *options(tmp_path, given))
        with tower_hooked(tower, given):
            check(pair, SOME, got)
        assert max(abs(g["logprob"] - p["logprob"]) for g, p in zip(got, plain)) > 0.01, given[0][:3]
    again = run_score(keel, pair, SOME)  # steered images were not kept for others
    assert [g["logprob"] for g in again] == [p["logprob"] for p in plain]


def test_image_positions(keel, make_pair, tmp_path):
    """A direction at the image tokens of the language model: soft tokens and nothing else."""
    pair = make_pair("tiny_a")
    model, mmproj, vlm, folder = pair
    v = vector(1, 96)
    row = SOME[1]
    at = write_rows(folder / "image.jsonl", [row])
    keel("capture", "-m", model, "--mmproj", mmproj, "--data", at, "--out", tmp_path / "c.safetensors", "--positions", "image", "--raw",
         tmp_path / "raw.safetensors", "--layers", "2")
    before = load_file(tmp_path / "raw.safetensors")
    assert len(before["position"]) == vlm.n_soft and np.ptp(before["position"]) == vlm.n_soft - 1
    steer = options(tmp_path, [("post", 2, "add", v, 3.0, "image")])
    for positions, moved in (("image", v * 3), ("prompt", None)):
        keel("capture", "-m", model, "--mmproj", mmproj, "--data", at, "--out", tmp_path / "c.safetensors", "--positions", positions, "--raw",
             tmp_path / f"{positions}.safetensors", "--layers", "2", *steer)
    after = load_file(tmp_path / "image.safetensors")
    assert np.abs(after["hidden.2"] - before["hidden.2"] - v * 3).max() < 1e-4
    whole = load_file(tmp_path / "prompt.safetensors")
    keel("capture", "-m", model, "--mmproj", mmproj, "--data", at, "--out", tmp_path / "c.safetensors", "--positions", "prompt", "--raw",
         tmp_path / "plain.safetensors", "--layers", "2")
    rest = ~np.isin(whole["position"], before["position"])
    assert np.abs((whole["hidden.2"] - load_file(tmp_path / "plain.safetensors")["hidden.2"])[rest]).max() < 1e-4


@pytest.mark.parametrize("site", ["tower.post", "tower.attn", "tower.mlp"])
def test_capture(keel, make_pair, tmp_path, site):
    model, mmproj, vlm, folder = make_pair("tiny_a")
    tower, out, raw = tower_of(vlm), tmp_path / "c.safetensors", tmp_path / "raw.safetensors"
    keel("capture", "-m", model, "--mmproj", mmproj, "--data", write_rows(folder / "d.jsonl", SOME), "--out", out, "--raw", raw, "--site", site,
         "--layers", "0,2", "--covariance")
    got, tokens = load_file(out), load_file(raw)
    for layer in (0, 2):
        seen = []
        handle = module_at(tower, site, layer).register_forward_hook(lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o).reshape(-1, 64)))
        for row in SOME:
            for name in row["images"]:
                tower(pixel_values=torch.from_numpy(vlm.pixels(folder / name)[None]))
        handle.remove()
        h = torch.cat(seen).numpy().astype(np.float64)
        size = np.abs(h).max()
        assert np.abs(tokens[f"hidden.{layer}"] - h).max() < 1e-4 * size
        assert np.abs(got[f"mean.{layer}"] - h.mean(0)).max() < 1e-4 * size
        assert np.abs(got[f"cov.{layer}"] - np.cov(h.T, bias=True)).max() < 1e-3 * h.var(0).max()
        n = len(h) // sum(len(r["images"]) for r in SOME)
        ends = np.cumsum([n * len(r["images"]) for r in SOME])
        want = np.stack([x.mean(0) for x in np.split(h, ends[:-1])])
        assert np.abs(got[f"rows.{layer}"] - want).max() < 1e-4 * size


def test_direction_of_the_tower(keel, make_pair, tmp_path):
    """Two images apart: their direction is the difference of means, and adding it moves the soft tokens."""
    pair = make_pair("tiny_a")
    model, mmproj, _, folder = pair
    rows = lambda name, files: write_rows(folder / name, [{"prompt": "<image>", "images": [f]} for f in files])
    keel("direction", "-m", model, "--mmproj", mmproj, "--positive", rows("p.jsonl", ["p0.png", "p1.png"]), "--negative",
         rows("n.jsonl", ["p2.png", "p3.png"]), "--site", "tower.post", "--method", "mean", "--out", tmp_path / "v.safetensors")
    v = load_file(tmp_path / "v.safetensors")
    assert sorted(v) == ["direction.0", "direction.1", "direction.2"] and v["direction.0"].shape == (64,)
    plain = run_score(keel, pair, SOME[:1])
    got = run_score(keel, pair, SOME[:1], "--steer", f"{tmp_path}/v.safetensors:1@1")
    with tower_hooked(tower_of(pair[2]), [("tower.post", 1, "add", v["direction.1"], 1.0, "all")]):
        check(pair, SOME[:1], got)
    assert got[0]["logprob"] != plain[0]["logprob"]


def test_bad_input(keel, make_pair, tmp_path):
    model, mmproj, _, folder = make_pair("tiny_a")
    data = write_rows(folder / "d.jsonl", SOME[:1])
    run = lambda hook, *says, more=("--mmproj", mmproj): keel.fails(
        "score", "-m", model, *more, "--data", data, "--out", tmp_path / "o.jsonl", *options(tmp_path, [hook]), says=says)
    run(("tower.post", 0, "add", vector(1, 64), 1, "prompt"), "all or image")
    run(("tower.post", 0, "add", vector(1, 64), 1, "all,tokens=linear:3"), "tower.post", "schedule")
    run(("tower.post", 0, "add", vector(1, 96), 1, "all"), "96", "tower's is 64")
    run(("tower.post", 7, "add", vector(1, 64), 1, "all"), "layer 7", "0 to 2")
    text = write_rows(tmp_path / "t.jsonl", [{"prompt": "the", "completion": " sky"}])
    keel.fails("score", "-m", model, "--data", text, "--out", tmp_path / "o.jsonl",
               *options(tmp_path, [("tower.post", 0, "add", vector(1, 64), 1, "all")]), says="--mmproj")
    keel.fails("capture", "-m", model, "--data", text, "--out", tmp_path / "c.safetensors", "--site", "tower.post", says="--mmproj")
    keel.fails("capture", "-m", model, "--mmproj", mmproj, "--data", text, "--out", tmp_path / "c.safetensors", "--site", "tower.post",
               says=["row 1", "no image"])
