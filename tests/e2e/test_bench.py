# SPDX-License-Identifier: MIT
"""bench: phases, ops, comparison with a saved run, and the trace of a step."""
import json
import signal

import pytest

import tiny_vision

SMALL = ("--prompt-tokens", 24, "-n", 3, "--rows", 1, "--seq-len", 16, "--rank", 4, "--repeats", 1)
PHASES = ["prefill", "decode", "train"]


@pytest.fixture(scope="module")
def run(keel, tiny, tmp_path_factory):
    """One run: its JSON, the file that holds it, and its trace."""
    out = tmp_path_factory.mktemp("bench")
    r = keel("bench", "-m", tiny / "tiny_a.gguf", *SMALL, "--json", "--trace", out / "trace.json")
    (out / "run.json").write_text(r.out)
    return r.json, out / "run.json", json.loads((out / "trace.json").read_text())


def test_phases_and_ops(run):
    j = run[0]
    assert j["peak_gflops"] > 0 and j["peak_gbps"] > 0
    assert [p["phase"] for p in j["phases"]] == PHASES
    for p, tokens in zip(j["phases"], (24, 3, 16)):
        assert p["tokens"] == tokens and p["tokens_per_second"] > 0
        assert 0 <= p["host_seconds"] <= p["seconds"]
        assert p["dispatches"] >= p["submits"] > 0
        assert p["dispatches"] == sum(o["count"] for o in p["ops"]), "the timed run does what the others do"
        assert abs(sum(o["share"] for o in p["ops"]) - 1) < 1e-6
        assert 0 < p["roof"] and all(o["ms"] >= 0 and o["gbps"] >= 0 and o["gflops"] >= 0 for o in p["ops"])
    assert any(o["op"].startswith("linear") for o in j["phases"][1]["ops"])


def test_trace(run):
    """Trace Event Format: every op of the table is there with its time, inside its submission, and none overlaps another."""
    j, _, trace = run
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert sorted(names.values()) == sorted(PHASES)
    for pid, name in names.items():
        phase = next(p for p in j["phases"] if p["phase"] == name)
        ops = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        for o in phase["ops"]:
            mine = [e for e in ops if e["name"] == o["op"]]
            assert len(mine) == o["count"]
            assert sum(e["dur"] for e in mine) / 1e3 == pytest.approx(o["ms"], rel=1e-6, abs=1e-6)
        ops.sort(key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in zip(ops, ops[1:]))
        begin = {e["id"]: e["ts"] for e in events if e["ph"] == "b" and e["pid"] == pid}
        end = {e["id"]: e["ts"] for e in events if e["ph"] == "e" and e["pid"] == pid}
        assert begin.keys() == end.keys() == {e["args"]["submission"] for e in ops}
        assert all(begin[i] < end[i] for i in begin) and min(begin.values()) == 0


def test_images(keel, tiny_a, tmp_path):
    """With a tower: an image through it, and rows that begin with one beside rows of text; rows without room are an error."""
    s = tiny_vision.SHAPES["vis_a"]
    tiny_vision.write_mmproj(tmp_path / "p.gguf", s, *tiny_vision.make(s))
    n = s.side ** 2
    args = ("bench", "-m", tiny_a, "--mmproj", tmp_path / "p.gguf", *SMALL[:6], "--rank", 4, "--repeats", 1)
    j = keel(*args, "--seq-len", n + 8, "--json", "--trace", tmp_path / "t.json").json
    assert [p["phase"] for p in j["phases"]] == ["image", *PHASES, "train_image"]
    image, *_, text, train = j["phases"]
    assert image["tokens"] == n and text["tokens"] == train["tokens"] == n + 8
    for p in j["phases"]:
        assert p["dispatches"] == sum(o["count"] for o in p["ops"])
    # One dispatch more brings the soft tokens into place; the wanted tokens are fewer.
    assert train["dispatches"] == text["dispatches"] + 1
    assert sum(o["count"] for o in image["ops"] if o["op"] == "attn_softmax") == s.layers
    keel.fails(*args, "--seq-len", n + 1, says=(f"{n + 1} tokens", f"image of {n}"))
    assert [p["phase"] for p in keel(*args[:-6], "--rows", 0, "--prompt-tokens", 0, "-n", 0, "--json").json["phases"]] == ["image"]


def test_compare(keel, tiny_a, run, tmp_path):
    saved = run[1]
    j = keel("bench", "-m", tiny_a, *SMALL, "--json", "--compare", saved).json
    assert [c["phase"] for c in j["compare"]] == PHASES
    for c, p, q in zip(j["compare"], run[0]["phases"], j["phases"]):
        assert c["ratio"] == pytest.approx(q["tokens_per_second"] / p["tokens_per_second"], rel=1e-6)
        assert {o["op"] for o in c["ops"]} == {o["op"] for o in p["ops"]} | {o["op"] for o in q["ops"]}
    # Ops that only the saved run has, and phases of another length.
    old = dict(run[0])
    old["phases"] = [dict(p, ops=p["ops"] + [dict(p["ops"][0], op="gone")]) for p in old["phases"]]
    (tmp_path / "old.json").write_text(json.dumps(old))
    j = keel("bench", "-m", tiny_a, *SMALL[:2], "-n", 0, "--rows", 0, "--repeats", 1, "--json", "--compare", tmp_path / "old.json").json
    gone = next(o for o in j["compare"][0]["ops"] if o["op"] == "gone")
    assert gone["us_per_token"] is None and gone["ratio"] is None and gone["saved_us_per_token"] > 0
    assert "faster now" in keel("bench", "-m", tiny_a, *SMALL[:2], "-n", 0, "--rows", 0, "--repeats", 1, "--compare", saved).out


def test_compare_with_no_run_is_an_error(keel, tiny_a, tmp_path):
    (tmp_path / "a.json").write_text('{"phases": [\n{"phase": 1}]}')
    (tmp_path / "b.json").write_text('{"phases": [\n')
    for name, word in (("a.json", "not a run"), ("b.json", "b.json:2"), ("c.json", "No such file")):
        keel.fails("bench", "-m", tiny_a, "--compare", tmp_path / name, says=(name, word))
    keel.fails("bench", "-m", tiny_a, *SMALL, "--no-ops", "--trace", tmp_path / "t.json", says="t.json", leaves=tmp_path)
    keel.fails("bench", "-m", tiny_a, *SMALL, "--trace", tmp_path / "no" / "t.json", says="no/t.json", leaves=tmp_path)


def test_ctrl_c_reaches_what_has_no_progress_callback(keel, tiny_a):
    """The signal handler tells the library, which looks between repeats."""
    p = keel.start("bench", "-m", tiny_a, *SMALL[:-2], "--repeats", 1000)
    while b"prefill: 2/" not in (line := p.stderr.readline()) and line:
        pass
    p.send_signal(signal.SIGINT)
    assert p.wait(timeout=60) == 1
