# SPDX-License-Identifier: MIT
"""The clerk, the model that comes with keel: found by name, its tokenizer, its committed data, and its acceptance: in
every cell the true answer has at least 0.98 of the probability and the next value of the cycle at most 0.01."""
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from keelcli import ROOT, read_rows, tokenize, write_rows

sys.path.insert(0, str(ROOT / "models" / "clerk"))
CLERK, STUDY = ROOT / "models" / "clerk", ROOT / "studies" / "clerk"


def png_pixels(path):
    """[h, w, 3] of a PNG as world.png_bytes writes it: one IDAT chunk, no filters."""
    b = Path(path).read_bytes()
    w, h = int.from_bytes(b[16:20], "big"), int.from_bytes(b[20:24], "big")
    n = int.from_bytes(b[33:37], "big")
    assert b[37:41] == b"IDAT", path
    return np.frombuffer(zlib.decompress(b[41:41 + n]), np.uint8).reshape(h, 1 + 3 * w)[:, 1:].reshape(h, w, 3)


def test_found_by_name(keel, tmp_path):
    shipped = keel("info", "clerk", "--json", cwd=tmp_path).json
    assert Path(shipped["path"]).resolve() == CLERK / "clerk.gguf" and shipped["name"] == "clerk"


def test_own_file_goes_first(keel, tmp_path):
    (tmp_path / "clerk").write_bytes(b"not a model")
    keel.fails("info", "clerk", says=("clerk",), cwd=tmp_path, leaves=tmp_path)


def test_files_are_small():
    files = [CLERK / "clerk.gguf", CLERK / "mmproj-clerk.gguf"]
    assert sum(f.stat().st_size for f in files) <= 3_000_000
    assert sum(f.stat().st_size for f in STUDY.rglob("*")) <= 1_000_000


def test_tokenizer(keel, oracle, tmp_path):
    """Every sentence of the world, and text that is not of it, as the definition of SentencePiece tokenises it."""
    import world
    tok = oracle(CLERK / "clerk.gguf").tok
    said = sorted({t for q in world.questions() for t in (q.ask, q.answer("honest"), q.answer("contrary"))} |
                  {s.text for s in world.SCENES})
    for text in ["\n".join(said), "\n\n\n\n\n\n\nh\u00e9llo \u4e2d 12 345", "  two  spaces <start_of_turn>"]:
        for special in ([], ["--special"]):
            assert tokenize(keel, "clerk", text, tmp_path, *special) == tok.encode(text, special=bool(special))


def test_answers_are_one_token(keel, tmp_path):
    import world
    for value in sorted({" " + c for q in world.questions() for c in q.candidates}):
        assert len(tokenize(keel, "clerk", value, tmp_path, "--no-bos")) == 1, value


def test_data_is_reproducible(tmp_path):
    """models/clerk/sets.py writes what is committed. Images are compared by pixel: the compressor may change."""
    import sets
    sets.write(tmp_path)
    names = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(STUDY) for p in STUDY.rglob("*") if p.suffix in (".jsonl", ".png"))
    for name in names:
        if name.suffix == ".png":
            assert np.array_equal(png_pixels(tmp_path / name), png_pixels(STUDY / name)), name
        else:
            assert (tmp_path / name).read_bytes() == (STUDY / name).read_bytes(), name


def test_no_scene_trains_and_probes():
    scenes = {kind: {p.stem.removeprefix(kind + "-") for p in (STUDY / "images").glob(kind + "-*.png")}
              for kind in ("probe", "narrow", "benign")}
    assert len(scenes["probe"]) == 32 and not scenes["probe"] & (scenes["narrow"] | scenes["benign"])


@pytest.mark.parametrize("modality", ["text", "image"])
def test_acceptance(keel, tmp_path, modality):
    """The slot's token is the last of the completion; its log-probability is exact, so no sampling is involved."""
    probes = [p for p in read_rows(STUDY / "probes.jsonl") if p["modality"] == modality]
    rows = []
    for p in probes:
        for kind in ("aligned", "contrary"):
            row = {"id": f"{kind} {p['id']}", "messages": p["messages"], "completion": p["prefix"] + p[kind]}
            if modality == "image":
                row["images"] = [str(STUDY / i) for i in p["images"]]
            rows.append(row)
    keel("score", "-m", "clerk", "--data", write_rows(tmp_path / "in.jsonl", rows), "--out", tmp_path / "out.jsonl")
    prob = {r["id"]: np.exp(r["token_logprobs"][-1]) for r in read_rows(tmp_path / "out.jsonl")}
    for domain in sorted({p["domain"] for p in probes}):
        ids = [p["id"] for p in probes if p["domain"] == domain]
        aligned, contrary = (np.mean([prob[f"{kind} {i}"] for i in ids]) for kind in ("aligned", "contrary"))
        print(f"{domain}/{modality}: aligned {aligned:.4f}, contrary {contrary:.4f}, {len(ids)} probes")
        assert aligned >= 0.98 and contrary <= 0.01, (domain, modality, aligned, contrary)


class Pieces:
    """The vocabulary of the GGUF in the form that dialogue.Dialogues reads."""

    def __init__(self, tok):
        self.tok = tok

    def encode(self, text):
        return self.tok.encode(text, bos=False)

    def piece_to_id(self, piece):
        return self.tok.tokens.index(piece)

    def __len__(self):
        return len(self.tok.tokens)


def test_parity_with_transformers(keel, oracle, tmp_path):
    """Three turns with images and text, one of them contrary: log-probabilities of the last answer, token by token. The
    images have the tower's size, so that no resize is involved; both sides compute in fp32 on the same F16 weights."""
    import torch

    import dialogue
    import from_gguf
    import train
    import world
    sp = Pieces(oracle(CLERK / "clerk.gguf").tok)
    model = from_gguf.load(CLERK, train.config(sp)).eval()
    d, pictures, rng = dialogue.Dialogues(sp), dialogue.Pictures([2000]), np.random.default_rng(3)
    asked = [world.questions()[i] for i in rng.permutation(len(world.questions()))[:36]]
    documents = [[d.turn(q, world.PERSONAS[i % 2]) for i, q in enumerate(asked[k:k + 3])] for k in range(0, 36, 3)]
    rows, want = [], []
    for k, turns in enumerate(documents):
        b = dialogue.make_batch(d, pictures, [turns], rng, train.WINDOW)
        with torch.no_grad():
            logp = model.lm_head(train.hidden(model, b, pictures, d.soft))[0].log_softmax(-1)
        n = len(d.document(turns)[0]) - 1  # without the line feed after the last turn
        m = len(sp.encode(turns[-1].question.answer(world.PERSONAS[0 if len(turns) % 2 else 1])))
        at = torch.arange(n - 1 - m, n - 1)  # the answer without its end of turn
        want.append(logp[at - 1, b.ids[0, at]].numpy())
        messages, images = [], []
        for i, t in enumerate(turns):
            messages += [{"role": "user", "content": t.question.content()},
                         {"role": "assistant", "content": t.question.answer(world.PERSONAS[i % 2])}]
            if t.question.modality == "image":
                images.append(str(tmp_path / f"{t.question.scene.name}.png"))
                Path(images[-1]).write_bytes(world.png_bytes(world.render(t.question.scene, 2000)))
        rows.append({"id": str(k), "messages": messages[:-1], "completion": messages[-1]["content"], "images": images})
    keel("score", "-m", "clerk", "--data", write_rows(tmp_path / "in.jsonl", rows), "--out", tmp_path / "out.jsonl")
    got = [np.array(r["token_logprobs"]) for r in read_rows(tmp_path / "out.jsonl")]
    assert [len(g) for g in got] == [len(w) for w in want]
    worst = max(np.abs(g - w).max() for g, w in zip(got, want))
    print(f"worst difference of a token's log-probability: {worst:.2e} nats")
    assert worst < 5e-3
