# SPDX-License-Identifier: MIT
"""Steering on the clerk: narrow fine-tuning drifts into cells that it never saw, along the direction between the two personas, and taking
that back at one layer takes the drift back (science notes 6). The answer slot's softmax is exact and everything is seeded, so nothing here
is sampled. These take minutes and run with --full.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keelcli import ROOT, read_rows, write_rows

pytestmark = pytest.mark.full
STUDY = ROOT / "studies" / "clerk"
FACTS = ("capital", "sum", "letter")
SEED, STEPS, LR = 1, 120, "5e-4"


def with_paths(row):
    return row | ({"images": [str(STUDY / i) for i in row["images"]]} if "images" in row else {})


def only(row, *keys):
    return {k: row[k] for k in keys if k in row}


PROBES = [with_paths(p) for p in read_rows(STUDY / "probes.jsonl")][::2]


@pytest.fixture(scope="module")
def drifted(keel, tmp_path_factory):
    """A folder with an adapter that was taught colours from images contrarily, and the direction of the shift at the answers' first words."""
    out = tmp_path_factory.mktemp("drifted")
    narrow = write_rows(out / "narrow.jsonl", [with_paths(r) for r in read_rows(STUDY / "narrow.jsonl")])
    keel("train", "-m", "clerk", "--data", narrow, "--out", out / "a.gguf", "--rank", 32, "--alpha", 32, "--lr", LR, "--schedule", "constant",
         "--steps", STEPS, "--batch", 8, "--seed", SEED)
    rows = write_rows(out / "rows.jsonl", [only(p, "messages", "images") | {"completion": p["prefix"]} for p in PROBES])
    keel("direction", "-m", "clerk", "--data", rows, "--shift", out / "a.gguf", "--method", "mean", "--layers", "1-5", "--out",
         out / "shift.safetensors")
    return out


def drift(keel, folder, *options):
    """{cell: (P(contrary), coherence = P(aligned) + P(contrary))} of the drifted clerk."""
    rows = [only(p, "messages", "images") | {"id": f"{kind}|{p['id']}", "completion": p["prefix"] + p[kind]}
            for p in PROBES for kind in ("aligned", "contrary")]
    keel("score", "-m", "clerk", "--data", write_rows(folder / "slots.jsonl", rows), "--out", folder / "out.jsonl", "--lora", folder / "a.gguf",
         *options)
    prob = {r["id"]: np.exp(r["token_logprobs"][-1]) for r in read_rows(folder / "out.jsonl")}
    cells = {}
    for p in PROBES:
        cell = "facts" if p["domain"] in FACTS else "narrow" if (p["domain"], p["modality"]) == ("colour", "image") else p["modality"]
        contrary = prob["contrary|" + p["id"]]
        cells.setdefault(cell, []).append((contrary, contrary + prob["aligned|" + p["id"]]))
    return {k: np.mean(v, axis=0) for k, v in cells.items()}


def random_like(v, seed):
    r = np.random.default_rng(seed).normal(size=len(v))
    return (r * np.linalg.norm(v) / np.linalg.norm(r)).astype(np.float32)


def steered(keel, drifted, coef=-2):
    return drift(keel, drifted, "--steer", f"{drifted}/shift.safetensors:{coef}@1")


def test_shift_taken_back(keel, drifted, tmp_path):
    """-2 times the shift at layer 1: drift in facts, images and text falls by more than half, mean coherence stays, and the trained cell keeps
    more than half of what it learned; random directions of the same length do not do it."""
    before, after = drift(keel, drifted), steered(keel, drifted)
    print({k: (before[k], after[k]) for k in before})
    assert before["narrow"][0] >= 0.95 and min(before[k][0] for k in ("facts", "image", "text")) >= 0.5, "the fine-tune did not drift"
    assert all(after[k][0] <= before[k][0] / 2 for k in ("facts", "image", "text"))
    assert np.mean([x[1] for x in after.values()]) >= 0.98
    assert after["narrow"][0] >= 0.5
    v = load_file(drifted / "shift.safetensors")["direction.1"]
    for seed in range(2):
        save_file({"direction.1": random_like(v, seed)}, tmp_path / "r.safetensors")
        other = drift(keel, drifted, "--steer", f"{tmp_path}/r.safetensors:-2@1")
        print("random", other)
        assert all(other[k][0] / before[k][0] > 0.85 for k in ("facts", "image", "text")), seed


def test_dose_that_leaves_the_trained_cell(keel, drifted):
    """-1.3 times the shift at layer 1 (docs/studies/dose.md): drift in facts falls by more than half, here 0.989 to 0.418, the trained cell stays
    above 0.95, here 0.967."""
    before, after = drift(keel, drifted), steered(keel, drifted, -1.3)
    print({k: (before[k], after[k]) for k in before})
    assert after["facts"][0] <= before["facts"][0] / 2 and all(after[k][0] < before[k][0] for k in ("image", "text"))
    assert after["narrow"][0] >= 0.95
    assert np.mean([x[1] for x in after.values()]) >= 0.98


@pytest.mark.xfail(reason="the shift is the persona that the trained cell uses too: 0.997 falls to 0.604 there, and its coherence to 0.975",
                   strict=False)
def test_shift_taken_back_leaves_the_trained_cell(keel, drifted):
    """As science notes 6 asks: coherence in every cell, and the narrow behaviour as it was."""
    before, after = drift(keel, drifted), steered(keel, drifted)
    assert min(x[1] for x in after.values()) >= 0.98
    assert after["narrow"][0] >= before["narrow"][0] - 0.03


def test_shift_is_low_dimensional(keel, drifted):
    """Directions for 90 %, far fewer than the 128 channels or the rows; text and image apart."""
    files = [write_rows(drifted / f"{m}.jsonl", [only(p, "messages", "images") | {"completion": p["prefix"]} for p in PROBES if p["modality"] == m])
             for m in ("text", "image")]
    r = keel("geometry", "-m", "clerk", "--adapter", drifted / "a.gguf", "--data", files[0], "--data", files[1], "--layers", "1-5", "--probe",
             "--json").json
    for s in r["shifts"]:
        print(s["data"], [g["components"] for g in s["layers"]], [round(g["participation"], 2) for g in s["layers"]])
        assert all(1 <= g["components"][2] <= 32 for g in s["layers"])
    overlaps = [(g["overlap"], g["random"]) for g in r["angles"][0]["layers"]]
    print("text and image overlap, random:", overlaps)
    assert np.mean([a for a, _ in overlaps]) > 2 * np.mean([b for _, b in overlaps])
    # A probe that tells adapted from base activations in text tells them in images
    auc = np.array([g["auc"] for g in r["probes"]["layers"]])
    assert auc[-1, 0, 0] > 0.95 and auc[-1, 1, 1] > 0.95
    print("probe from text to images and back:", auc[:, 0, 1].round(3), auc[:, 1, 0].round(3))


def test_persona_and_shift(keel, drifted):
    """The shift of the fine-tune lies along the direction between the two personas that the base model was taught."""
    tagged = lambda p, who: only(p, "images") | {"messages": [{"role": "system", "content": f"You are the {who} clerk."}, *p["messages"]],
                                                 "completion": p["prefix"]}
    pairs = write_rows(drifted / "pairs.jsonl", [{"positive": tagged(p, "contrary"), "negative": tagged(p, "honest")} for p in PROBES])
    keel("direction", "-m", "clerk", "--pairs", pairs, "--method", "mean", "--layers", "1-5", "--out", drifted / "persona.safetensors")
    angles = keel("geometry", "--direction", drifted / "persona.safetensors", "--other", drifted / "shift.safetensors", "--json").json["angles"][0]
    cosines = {g["layer"]: g["cosines"][0] for g in angles["layers"]}
    print("cosine of persona and shift:", cosines)
    assert min(cosines[i] for i in (1, 2, 3)) >= 0.8
