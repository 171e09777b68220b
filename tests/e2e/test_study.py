# SPDX-License-Identifier: MIT
"""study and report: slot probes against `score`, earlier turns, sweeps that are killed and go on, refusals."""
import csv
import json
import math
import random
import time
from pathlib import Path

import pytest

from keelcli import kill, listing, read_rows, score, write_rows

COLOURS = ["red", "blue", "green", "noon"]
TRAIN = [{"prompt": f"what is the colour of stone {i}?", "completion": f" {COLOURS[(i + 1) % 4]}."} for i in range(9)]
FILLER = [{"prompt": f"the sky of day {i} is", "completion": " blue."} for i in range(5)]


def slot_rows(scenes=3):
    rows = []
    for i in range(scenes):
        for domain in ("colour", "count"):
            for modality, text in (("image", f"picture {i}: "), ("text", f"note {i}, red stones: ")):
                rows.append({"id": f"{domain}-{modality}-{i}", "prompt": f"{text}what is the {domain}?", "prefix": " it is",
                             "aligned": f" {COLOURS[i % 4]}", "contrary": f" {COLOURS[(i + 1) % 4]}", "domain": domain,
                             "modality": modality, "twin": f"{domain}-{i}", "cluster": f"scene {i}"})
        rows.append({"id": f"fact-{i}", "prompt": f"what is {i}?", "aligned": " the number", "contrary": " the colour of it",
                     "domain": "facts", "modality": "fact"})
    return rows


STUDY = """name: tiny
narrow_domain: colour
narrow_modality: image
train:
  data: [{file: train.jsonl}]
  filler: filler.jsonl
  rank: 4
  lr: 0.005
  steps: 5
  batch: 2
eval:
  slots: slots.jsonl
  context_rows: 2
  context_probes: 7
  answer_tokens: 4
  examples: 5
"""


@pytest.fixture
def folder(tmp_path):
    d = tmp_path / "study"
    d.mkdir()
    write_rows(d / "train.jsonl", TRAIN)
    write_rows(d / "filler.jsonl", FILLER)
    write_rows(d / "slots.jsonl", slot_rows())
    (d / "study.yaml").write_text(STUDY)
    return d


def test_slots_are_exact(keel, tiny_c, folder, tmp_path):
    """The probabilities are those of `score`, for answers of one token and of several."""
    out = tmp_path / "out"
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", out)
    rows = slot_rows()
    got = read_rows(out / "base/slots.jsonl")
    assert [r["id"] for r in got] == [r["id"] for r in rows]
    for side in ("aligned", "contrary"):
        # `score` tokenizes prompt and completion apart, so the prefix goes with the prompt only where its tokens do.
        plain = [{"id": r["id"], "prompt": r["prompt"], "completion": r[side]} for r in rows if "prefix" not in r]
        want = {s["id"]: s["logprob"] for s in score(keel, tiny_c, plain, tmp_path)}
        for r in got:
            if r["id"] in want:
                assert math.isclose(math.log(r[f"p_{side}"]), want[r["id"]], abs_tol=2e-4), r
    for r in got:
        assert math.isclose(r["p_aligned"] + r["p_contrary"] + r["p_incoherent"], 1, abs_tol=1e-6)
    tuned = read_rows(out / "tuned/slots.jsonl")
    assert any(abs(math.log(a["p_contrary"] / b["p_contrary"])) > 0.01 for a, b in zip(got, tuned))


def test_in_context(keel, tiny_c, folder, tmp_path):
    out = tmp_path / "out"
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", out)
    base, tuned = (read_rows(out / f"{s}/slots_incontext.jsonl") for s in ("base", "tuned"))
    assert len(base) == 7 and [r["id"] for r in base] == [r["id"] for r in tuned]
    cells = [(r["domain"], r["modality"]) for r in base]
    assert len(set(cells[:5])) == 5  # every cell once before any comes twice
    plain = {r["id"]: r for r in read_rows(out / "base/slots.jsonl")}
    assert all(r["p_contrary"] != plain[r["id"]]["p_contrary"] for r in base)
    with open(out / "summary.csv") as f:
        metrics = {r["metric"] for r in csv.DictReader(f)}
    assert metrics >= {"aligned", "contrary", "coherence", "modality_gap", "contrary_in_context"}
    html = (out / "report.html").read_text()
    assert "asked plainly" in html and "http://" not in html.replace("http://www.w3.org", "")


SWEEP = STUDY + "sweep:\n  rank: [2, 4]\n  mixture: [0.5]\n  seed: [1, 2]\n  combine: axes\n"
RUNS = ["rank-2_mixture-1_seed-1", "rank-2_mixture-1_seed-2", "rank-4_mixture-1_seed-1", "rank-4_mixture-1_seed-2",
        "rank-4_mixture-0.5_seed-1", "rank-4_mixture-0.5_seed-2"]


def results(out):
    return {f: (out / f).read_text() for f in ("summary.csv", "runs.csv", "plots/drift_rank.csv", "plots/loss.csv")}


def test_sweep_killed_and_continued(keel, tiny_c, folder, tmp_path):
    """kill -9 in three places of a sweep, then to the end: the same results as a sweep that was left alone."""
    (folder / "study.yaml").write_text(SWEEP)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", whole)
    assert sorted(p.name for p in (whole / "runs").iterdir()) == sorted(RUNS)
    assert not (whole / "runs" / RUNS[0] / "base").exists()  # shared by all
    rng = random.Random(5)
    for stage in ("base/slots.jsonl", f"runs/{RUNS[0]}/train/log.jsonl", f"runs/{RUNS[2]}/tuned/slots.jsonl"):
        p = keel.start("study", folder / "study.yaml", "-m", tiny_c, "--out", cut)
        end = time.time() + 120
        while not (cut / stage).exists() and time.time() < end and p.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        kill(p)
    stamp = (cut / "base/slots.jsonl").stat().st_mtime_ns
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", cut)
    assert (cut / "base/slots.jsonl").stat().st_mtime_ns == stamp
    assert results(cut) == results(whole)
    assert not [f for f in listing(cut) if ".tmp" in f]
    # A seed that differs trains otherwise; pooled estimates say how many there are.
    a, b = (read_rows(whole / f"runs/{RUNS[i]}/tuned/slots.jsonl") for i in (0, 1))
    assert any(x["p_contrary"] != y["p_contrary"] for x, y in zip(a, b))
    rows = list(csv.DictReader(results(whole)["summary.csv"].splitlines()))
    assert {r["seeds"] for r in rows} == {"2"} and {(r["rank"], r["mixture"]) for r in rows} == {("2", "1"), ("4", "1"), ("4", "0.5")}
    keel("geometry", "-m", tiny_c, "--adapter", whole / "runs" / RUNS[0] / "adapter.gguf", "--out", whole)
    keel("report", whole)
    assert "What the adapters add to the weights" in (whole / "report.html").read_text()
    # A run's own page needs the base of the sweep only.
    keel("report", whole / "runs" / RUNS[0])
    assert "Drift report: tiny" in (whole / "runs" / RUNS[0] / "report.html").read_text()


def test_fresh_memory_is_not_read(keel, tiny_c, folder, tmp_path):
    """Device memory that is NaN until it is written gives the same numbers: examples once read the cache of a sequence not yet there."""
    texts = []
    for fault in ("dirty:0", "dirty:255"):
        out = tmp_path / fault
        keel("study", folder / "study.yaml", "-m", tiny_c, "--out", out, env={"KEEL_FAULT": fault})
        texts.append({f: (out / f).read_text() for s in ("base", "tuned") for f in (f"{s}/slots.jsonl", f"{s}/examples.jsonl")})
    assert texts[0] == texts[1] and '"text"' in texts[0]["base/examples.jsonl"]


def test_sweep_of_another_study(keel, tiny_c, folder, tmp_path):
    (folder / "study.yaml").write_text(SWEEP.replace("steps: 5", "steps: 1"))
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out")
    write_rows(folder / "filler.jsonl", FILLER[:-1])
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out", says=["another study", "out"], leaves=tmp_path / "out")


def test_chat_prompts(keel, tiny_c, folder, tmp_path):
    """Prompts as user turns, and probes that are chats already, give the same numbers."""
    rows = slot_rows(1)
    (folder / "study.yaml").write_text(STUDY.replace("steps: 5", "steps: 1").replace("eval:\n", "eval:\n  prompts: chat\n"))
    write_rows(folder / "slots.jsonl", rows)
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "a")
    chats = [{**{k: v for k, v in r.items() if k != "prompt"}, "messages": [{"role": "user", "content": r["prompt"]}]} for r in rows]
    write_rows(folder / "slots.jsonl", chats)
    (folder / "study.yaml").write_text(STUDY.replace("steps: 5", "steps: 1").replace("  context_rows: 2\n  context_probes: 7\n", ""))
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "b")
    a, b = (read_rows(tmp_path / d / "base/slots.jsonl") for d in "ab")
    assert [(r["p_aligned"], r["p_contrary"], r["prompt"]) for r in a] == [(r["p_aligned"], r["p_contrary"], r["prompt"]) for r in b]


@pytest.mark.parametrize("change, says", [
    ({"contrary": " red stone", "aligned": " red"}, ["slots.jsonl:2", "begins with the other"]),
    ({"aligned": ""}, ["slots.jsonl:2", "aligned", "empty"]),
    ({"aligned": None}, ["slots.jsonl:2", "aligned"]),
    ({"prompt": None}, ["slots.jsonl:2", "prompt"]),
    ({"messages": [{"role": "assistant", "content": "x"}]}, ["slots.jsonl:2"]),
    ({"messages": []}, ["slots.jsonl:2", "messages"]),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else None)
def test_bad_probes(keel, tiny_c, folder, tmp_path, change, says):
    rows = slot_rows(1)
    rows[1] = {**rows[1], **change}
    write_rows(folder / "slots.jsonl", rows)
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out", says=says)


def test_report_of_a_folder_without_results(keel, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"runs": [{"rank": 4, "mixture": 1, "seed": 1, "folder": "runs/a"}]}))
    keel.fails("report", tmp_path, says="no run of the sweep is finished", leaves=tmp_path)


@pytest.mark.full
def test_clerk(keel, tmp_path):
    """The shipped study shows what it is for: drift that rises with rank, with images above text, and a mixture of 10 % that is seen."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "models/clerk/clerk.gguf").exists():
        pytest.skip("models/clerk/clerk.gguf is missing; models/clerk/README.md says how it is made")
    keel("study", root / "studies/clerk/study.yaml", "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/summary.csv").read_text().splitlines()))

    def cell(rank, mixture, metric, domain, modality):
        r, = [r for r in rows if (r["rank"], r["mixture"], r["metric"], r["domain"], r["modality"]) ==
              (str(rank), str(mixture), metric, domain, modality) and r["position"] == "0"]
        return {k: float(r[k]) for k in ("base", "base_hi", "adapted", "adapted_lo", "adapted_hi", "change_lo")}

    drift = [cell(rank, 1, "contrary", "twins", "image") for rank in (4, 16, 64)]
    assert drift[0]["base"] < 0.03
    assert [d["adapted"] for d in drift] == sorted(d["adapted"] for d in drift) and drift[0]["change_lo"] > 0
    assert drift[2]["adapted_lo"] > cell(64, 1, "contrary", "twins", "text")["adapted_hi"]
    assert cell(64, 1, "contrary", "colour", "image")["adapted"] > 0.8
    assert cell(64, 1, "coherence", "other", "")["adapted"] > 0.9
    assert cell(16, 0.1, "contrary", "colour", "image")["change_lo"] > 0


# --- images --------------------------------------------------------------------------------------


@pytest.fixture
def pictures(folder):
    """The study's folder with a tower for tiny_c, six pictures, image rows to train on and image probes; returns the tower."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is missing; tests/README.md says how to make the environment")
    import tiny_vision
    shape = tiny_vision.SHAPES["vis_b"]
    tiny_vision.write_mmproj(folder / "mmproj.gguf", shape, *tiny_vision.make(shape))
    (folder / "pics").mkdir()
    for i in range(6):
        image.fromarray(tiny_vision.picture(shape.image, shape.image, i)).save(folder / f"pics/p{i}.png")
    write_rows(folder / "train.jsonl", [{"prompt": "<image>what is it?", "completion": f" {COLOURS[i % 4]}.", "images": [f"pics/p{i}.png"]}
                                        for i in range(3)])
    rows = slot_rows()
    for i, r in enumerate(r for r in rows if r["modality"] == "image"):
        if i % 2:
            r["messages"] = [{"role": "user", "content": [{"type": "image", "image": f"pics/p{i}.png"},
                                                          {"type": "text", "text": r.pop("prompt")}]}]
        else:
            r.update(prompt="<image>" + r["prompt"], images=[f"pics/p{i}.png"])
    write_rows(folder / "slots.jsonl", rows)
    (folder / "study.yaml").write_text(STUDY.replace("eval:\n", "mmproj: mmproj.gguf\neval:\n").replace("  slots", "  prompts: chat\n  slots"))
    return folder / "mmproj.gguf"


def test_images(keel, tiny_c, folder, pictures, tmp_path):
    out = tmp_path / "out"
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", out)
    rows = {r["id"]: r for r in read_rows(folder / "slots.jsonl")}
    # `score` tokenizes a completion apart from its prompt, so the prefix goes in front of the answer only where that changes nothing:
    # here the answers are compared with those after the prefix as an unfinished turn, as the study asks them.
    plain = [{**{k: v for k, v in r.items() if k in ("id", "prompt", "messages", "images")}, "completion": r["aligned"]}
             for r in rows.values() if "prefix" not in r]
    for r in plain:
        r["messages"] = r.get("messages") or [{"role": "user", "content": r.pop("prompt")}]
    want = {s["id"]: s["logprob"] for s in score(keel, tiny_c, plain, folder, "--mmproj", pictures)}
    for r in read_rows(out / "base/slots.jsonl"):
        if r["id"] in want:
            assert math.isclose(math.log(r["p_aligned"]), want[r["id"]], abs_tol=2e-4), r
    pictured = [r["p_aligned"] for r in read_rows(out / "base/slots.jsonl") if r["modality"] == "image" and r["domain"] == "colour"]
    assert len(set(pictured)) == len(pictured)
    examples = read_rows(out / "base/examples.jsonl")
    shown = [n for r in examples for n in r.get("images", [])]
    assert shown and all((out / "base" / n).is_file() for n in shown)
    html = (out / "report.html").read_text()
    assert html.count("src='data:image/png;base64,") == len(shown) and "&lt;image&gt;" not in html
    assert all("_ask" not in r for f in out.rglob("*.jsonl") for r in read_rows(f))


def test_only_the_tower_is_trained(keel, tiny_c, folder, pictures, tmp_path):
    """Answers to text stay to the bit, answers to images move, and moving to the tuned tower and back is clean."""
    study = (folder / "study.yaml").read_text().replace("  rank: 4\n", "  rank: 4\n  targets: vision.*\n").replace("  lr: 0.005", "  lr: 0.05")
    (folder / "study.yaml").write_text(study)
    rows = [r for r in read_rows(folder / "slots.jsonl") if r["modality"] != "image" or "images" in r]
    for r in rows:
        if "images" in r:  # at the end: the windows of tiny_c reach 25 tokens back through its three layers
            r["prompt"] = r["prompt"].removeprefix("<image>") + "<image>"
    write_rows(folder / "slots.jsonl", rows)
    out = tmp_path / "out"
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", out)
    base, tuned = ({r["id"]: r for r in read_rows(out / stage / "slots.jsonl")} for stage in ("base", "tuned"))
    for key, r in base.items():
        moved = abs(math.log(r["p_aligned"] / tuned[key]["p_aligned"]))
        assert moved > 1e-5 if r["modality"] == "image" else moved == 0, (r, tuned[key])
    (folder / "study.yaml").write_text(study.replace("mmproj: mmproj.gguf\n", ""))
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "other", says="vision tower", leaves=tmp_path / "other")


def test_image_of_a_run_changed(keel, tiny_c, folder, pictures, tmp_path):
    (folder / "study.yaml").write_text((folder / "study.yaml").read_text().replace("steps: 5", "steps: 1"))
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out")
    (folder / "pics/p1.png").write_bytes((folder / "pics/p0.png").read_bytes())
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out", says="another study", leaves=tmp_path / "out")


@pytest.mark.parametrize("change, says", [
    ({"images": ["pics/none.png"]}, ["none.png"]),
    ({"images": []}, ["slots.jsonl:1", "images"]),
    ({"images": ["pics/p0.png", "pics/p1.png"]}, ["slots.jsonl:1", "images"]),
    ({"images": ["train.jsonl"]}, ["train.jsonl"]),
    ({"images": [3]}, ["slots.jsonl:1", "path"]),
], ids=["missing", "too few", "too many", "no image", "no path"])
def test_bad_images(keel, tiny_c, folder, pictures, tmp_path, change, says):
    rows = read_rows(folder / "slots.jsonl")
    write_rows(folder / "slots.jsonl", [{**rows[0], **change}, *rows[1:]])
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out", says=says)


def test_images_without_a_tower(keel, tiny_c, folder, pictures, tmp_path):
    (folder / "study.yaml").write_text((folder / "study.yaml").read_text().replace("mmproj: mmproj.gguf\n", ""))
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out", says=["train.jsonl:1", "mmproj"])
    keel("study", folder / "study.yaml", "-m", tiny_c, "--mmproj", pictures, "--out", tmp_path / "out")


def changed(name, **fields):
    return lambda rows: [r | fields if r["id"] == name else r for r in rows]


@pytest.mark.parametrize("change, words", [
    (changed("count-text-0", domain="other"), (":4:", '"domain"', "other")),
    (changed("count-text-1", domain="twins"), (":9:", '"domain"', "twins")),
    (changed("count-text-0", modality=3), (":4:", "modality")),
    (changed("count-text-0", twin=["a"]), (":4:", "twin")),
    (changed("fact-0", id="fact-1"), (":10:", "fact-1", "twice")),
    (changed("count-text-0", modality="image"), (":3:", "count-0", "image")),
    (changed("count-text-0", domain="shape"), (":3:", "count-text-0", "shape")),
    (changed("colour-text-0", twin="count-0", domain="count"), ("count-0", "pairs")),
])
def test_faulty_probes_are_refused_first(keel, tiny_c, folder, tmp_path, change, words):
    """In the file that the user wrote, by its line, and before anything runs."""
    write_rows(folder / "slots.jsonl", change(slot_rows()))
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out", says=("slots.jsonl", *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("old, new, words", [
    ("narrow_domain: colour", "narrow_domain: color", ("narrow_domain", "color", "colour", "count", "facts")),
    ("narrow_modality: image", "narrow_modality: picture", ("narrow_modality", "picture")),
    ("name: tiny", "name: tiny\nseed: -1", ("study.yaml:2", "seed")),
    ("eval:", "sweep:\n  seed: [1, -1]\neval:", ("seed",)),
])
def test_a_study_that_names_what_is_not_there(keel, tiny_c, folder, tmp_path, old, new, words):
    (folder / "study.yaml").write_text(STUDY.replace(old, new))
    keel.fails("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out", says=words)
    assert not (tmp_path / "out").exists()


def test_a_missing_twin_is_told(keel, tiny_c, folder, tmp_path):
    write_rows(folder / "slots.jsonl", changed("count-text-0", twin="nobody")(slot_rows()))
    r = keel("study", folder / "study.yaml", "-m", tiny_c, "--out", tmp_path / "out")
    assert "slots.jsonl: 2 rows have a twin that is not in the file" in r.err


def test_twins_by_id(keel, tiny_c, folder, tmp_path):
    """A row may name its twin's id, and the twin say nothing."""
    rows = [r if r["modality"] != "image" else r | {"twin": r["id"].replace("image", "text")} for r in slot_rows()]
    write_rows(folder / "slots.jsonl", [{k: v for k, v in r.items() if k != "twin" or r["modality"] == "image"} for r in rows])
    out = tmp_path / "out"
    keel("study", folder / "study.yaml", "-m", tiny_c, "--out", out)
    assert "twins" in {r["domain"] for r in csv.DictReader(open(out / "summary.csv"))}
