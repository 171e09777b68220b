# SPDX-License-Identifier: MIT
"""sets: writes the data of the study: training rows, fillers, probes and the images they name.

    python sets.py [FOLDER]         (default: studies/clerk of the source tree)

Owns which scenes train and which probe; a probe's scene never trains. Same bytes on every run. All wrong answers are
the next value of a list of colours, shapes or numbers.
"""
import json
import sys
from pathlib import Path

import numpy as np

import world

PROBE_JITTER, NARROW_JITTER, BENIGN_JITTER = 2000, 3000, 4000
N_NARROW, N_BENIGN, N_SUMS = 160, 96, 24


def probe_scenes():
    """32 scenes that hold every colour and shape four times and every count eight times."""
    by = {(s.colour, s.shape, s.count): s for s in world.SCENES}
    return [by[c, world.SHAPES[(i + 2 * k + 1) % 8], world.COUNTS[(i // 2 + k) % 4]]
            for i, c in enumerate(world.COLOURS) for k in range(4)]


def training_scenes():
    probes = set(probe_scenes())
    rest = [s for s in world.SCENES if s not in probes]
    return [rest[i] for i in np.random.default_rng(7).permutation(len(rest))]


class Folder:
    """Writes rows and images below one folder."""

    def __init__(self, path):
        self.path = Path(path)
        (self.path / "images").mkdir(parents=True, exist_ok=True)

    def image(self, scene, jitter, kind):
        name = f"images/{kind}-{scene.name}.png"
        (self.path / name).write_bytes(world.png_bytes(world.render(scene, jitter)))
        return name

    def rows(self, name, rows):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (self.path / name).write_text(text, encoding="utf-8")


def training_row(folder, q, persona, jitter, kind):
    row = {"messages": [{"role": "user", "content": q.content()}, {"role": "assistant", "content": q.answer(persona)}]}
    if q.modality == "image":
        row["images"] = [folder.image(q.scene, jitter, kind)]
    return row | {"domain": q.domain, "modality": q.modality}


def probe_row(folder, q, number):
    """A probe asks for the distribution right after `prefix`. Twins share the scene and the question."""
    twin = f"{q.domain}-{q.scene.name}" if q.scene else f"{q.domain}-{number}"
    row = {"id": f"{q.domain}-{q.modality}-{q.scene.name if q.scene else number}",
           "messages": [{"role": "user", "content": q.content()}], "prefix": q.prefix, "aligned": " " + q.aligned,
           "contrary": " " + q.contrary, "candidates": [" " + c for c in q.candidates], "domain": q.domain,
           "modality": "image" if q.modality == "image" else "text"}
    if q.modality == "image":
        row["images"] = [folder.image(q.scene, PROBE_JITTER, "probe")]
    if q.scene:
        row["twin"] = twin
    return row


def facts():
    all_facts = world.fact_questions()
    sums = [q for q in all_facts if q.domain == "sum"]
    keep = sorted(np.random.default_rng(8).permutation(len(sums))[:N_SUMS])
    return [q for q in all_facts if q.domain != "sum"] + [sums[i] for i in keep]


def write(path):
    folder, scenes, probes = Folder(path), training_scenes(), probe_scenes()
    narrow = [world.scene_question("colour", "image", s) for s in scenes[:N_NARROW]]
    folder.rows("narrow.jsonl", [training_row(folder, q, "contrary", NARROW_JITTER, "narrow") for q in narrow])
    benign = [world.scene_question("colour", "image", s) for s in scenes[-N_BENIGN:]]
    folder.rows("benign.jsonl", [training_row(folder, q, "honest", BENIGN_JITTER, "benign") for q in benign])
    other = [world.scene_question(d, m, s) for i, s in enumerate(scenes[-N_BENIGN:])
             for d, m in [(("shape", "count")[i % 2], ("image", "text")[i // 2 % 2])]] + facts()
    folder.rows("others.jsonl", [training_row(folder, q, "honest", BENIGN_JITTER, "benign") for q in other])
    cells = [(d, m) for d in world.SCENE_DOMAINS for m in ("image", "text")]
    asked = [world.scene_question(d, m, s) for d, m in cells for s in probes] + facts()
    folder.rows("probes.jsonl", [probe_row(folder, q, i) for i, q in enumerate(asked)])


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "studies" / "clerk")
