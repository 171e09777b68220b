# SPDX-License-Identifier: MIT
"""train against peft and torch.optim.AdamW in fp32: losses, gradients, adapters, and every promise about the data."""
import contextlib
import math

import numpy as np
import pytest
import torch

import lora
import texts
from keelcli import score, train, train_args, write_rows

RANK, ALPHA, LR = 4, 8, 1e-3
# Same weights, fp32 on both sides; what differs is summation order, carried through a few AdamW steps.
LOSS_TOL, NORM_TOL = 1e-3, 3e-3


def start(ref, tmp, targets=lora.TARGETS, seed=3, b_std=0.05):
    a = lora.random_adapter(ref.config, RANK, seed, targets, b_std)
    lora.write_gguf(tmp / "init.gguf", a, ALPHA)
    return a, {"init_adapter": tmp / "init.gguf", "rank": RANK, "alpha": ALPHA, "targets": ",".join(targets), "lr": LR}


def steps_of(rows, per):
    return [rows[i:i + per] for i in range(0, len(rows), per)]


def same_losses(log, want, tol=LOSS_TOL):
    assert [r["step"] for r in log] == list(range(1, len(want["loss"]) + 1))
    for r, loss, norm in zip(log, want["loss"], want["grad_norm"]):
        assert set(r) >= {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
        assert abs(r["loss"] / loss - 1) < tol, (r, loss)
        assert abs(r["grad_norm"] / norm - 1) < NORM_TOL, (r, norm)


def same_adapter(got, want, init, tol=0.02):
    """What training changed agrees: AdamW turns every gradient into a step of about lr, also those that are noise."""
    assert set(got) == set(want)
    d = lambda x: np.concatenate([(x[k][h] - init[k][h]).ravel() for k in sorted(want) for h in (0, 1)])
    g, w = d(got), d(want)
    assert np.linalg.norm(g - w) < tol * np.linalg.norm(w), np.linalg.norm(g - w) / np.linalg.norm(w)


def run_both(keel, model, ref, tmp, rows, batch, targets=lora.TARGETS, oracle_kw=None, **o):
    init, opts = start(ref, tmp, targets)
    steps = steps_of(rows, batch)
    out, log = train(keel, model, rows, tmp, **{**opts, "batch": batch, "steps": len(steps), **o})
    want = lora.train(ref, init, ALPHA, steps, [r["lr"] for r in log], **(oracle_kw or {}))
    same_losses(log, want)
    got, alpha = lora.read_gguf(out)
    assert alpha == ALPHA
    same_adapter(got, want["adapter"], init)
    return out, log, want


def test_losses(keel, model, oracle, tmp_path):
    run_both(keel, model, oracle(model), tmp_path, texts.TRAIN[:10], 2)


def test_gradients_per_tensor(keel, every_model, oracle, tmp_path):
    """One AdamW step with eps = lr = 1 moves a weight by u = g / (|g| + 1), so g = u / (1 - |u|) of every tensor."""
    ref = oracle(every_model)
    init, opts = start(ref, tmp_path)
    rows = texts.TRAIN[:3] + [texts.CHAT[1]]
    out, log = train(keel, every_model, rows, tmp_path, **{**opts, "lr": 1, "eps": 1, "batch": 4, "steps": 1})
    assert log[0]["lr"] == 1
    want = lora.train(ref, init, ALPHA, [rows], [1.0])["grads"]
    got = lora.read_gguf(out)[0]
    for k in want:
        for h, half in enumerate("ab"):
            u = init[k][h].astype(np.float64) - got[k][h]
            g = u / (1 - np.abs(u))
            # 2e-3 relative: f32 sums over some hundred terms and back through up to ten layers. The floor is one f32
            # rounding of a weight near 0.2 on each element, which the difference above cannot see.
            floor = 3e-8 * math.sqrt(g.size)
            err = np.linalg.norm(g - want[k][h])
            assert err < 2e-3 * np.linalg.norm(want[k][h]) + floor, (k, half, err, np.linalg.norm(want[k][h]))


@contextlib.contextmanager
def merged(ref, adapter, factor):
    """ref.model with factor * B A in its weights."""
    def change(sign):
        with torch.no_grad():
            for (layer, t), (a, b) in adapter.items():
                w = ref.model.get_submodule(f"model.layers.{layer}.{lora.LINEARS[t]}").weight
                w += sign * factor * torch.from_numpy(b) @ torch.from_numpy(a)
    change(1)
    try:
        yield
    finally:
        change(-1)


def test_on_top_of_a_frozen_adapter(keel, tiny_a, oracle, tmp_path):
    """Training under an adapter that stays as it is equals training the model that it is merged into, with a wider and a narrower
    rank than the new one's, a scale, and projections that only one of the two has. The frozen file is left as it was."""
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path, ["attn_q", "ffn_down"])
    frozen = lora.random_adapter(ref.config, 7, 11, ["attn_q", "attn_v", "ffn_up"], 0.1)
    lora.write_gguf(tmp_path / "frozen.gguf", frozen, 14)
    before = (tmp_path / "frozen.gguf").read_bytes()
    rows = texts.TRAIN[:6]
    out, log = train(keel, tiny_a, rows, tmp_path, **{**opts, "batch": 2, "steps": 3, "lora": f"{tmp_path / 'frozen.gguf'}:0.5"})
    with merged(ref, frozen, 0.5 * 14 / 7):
        want = lora.train(ref, init, ALPHA, steps_of(rows, 2), [r["lr"] for r in log])
    same_losses(log, want)
    got, _ = lora.read_gguf(out)
    same_adapter(got, want["adapter"], init)
    assert (tmp_path / "frozen.gguf").read_bytes() == before
    _, alone = train(keel, tiny_a, rows, tmp_path, "b.gguf", **{**opts, "batch": 2, "steps": 3})
    assert abs(alone[0]["loss"] / log[0]["loss"] - 1) > 0.01  # the frozen adapter does change the model
    # A state is of its frozen adapters.
    o = {**opts, "batch": 2, "steps": 4, "no_shuffle": True, "grad_clip": 0, "resume": tmp_path / "a.gguf.state"}
    keel.fails(*train_args(tiny_a, tmp_path / "a.gguf.rows.jsonl", tmp_path / "a.gguf", **o), says="--lora")


@pytest.mark.parametrize("targets", [["attn_q"], ["attn_v", "ffn_down"], pytest.param(["attn_output", "ffn_gate", "ffn_up"], marks=pytest.mark.full),
                                     pytest.param(["attn_k"], marks=pytest.mark.full)], ids="+".join)
def test_targets(keel, tiny_a, oracle, tmp_path, targets):
    """A name matches exactly its projection: attn_q is not attn_q_norm, and the file holds nothing else."""
    out, _, _ = run_both(keel, tiny_a, oracle(tiny_a), tmp_path, texts.TRAIN[:6], 2, targets)
    assert {t for _, t in lora.read_gguf(out)[0]} == set(targets)


def test_unknown_target(keel, tiny_a, tmp_path):
    write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    keel.fails("train", "-m", tiny_a, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "a.gguf", "--targets", "attn",
               says="attn", rc=(1, 2), leaves=tmp_path)


@pytest.mark.parametrize("rows", [texts.CHAT, [{**r, "eos": True} for r in texts.TRAIN[:4]],
                                  [{**r, "eos": False} for r in texts.TRAIN[:4]]], ids=["messages", "eos", "no-eos"])
def test_which_tokens_are_learnt(keel, tiny_a, oracle, tmp_path, rows):
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path)
    _, log = train(keel, tiny_a, rows, tmp_path, **{**opts, "batch": 1, "steps": len(rows), "lr": 0})
    for row, got in zip(rows, log, strict=True):
        ids, mask = lora.row_ids(ref.tok, row)
        lp = lora.logprobs(ref, init, ALPHA, ids)
        want = -np.mean([x for x, m in zip(lp, mask[1:]) if m])
        assert abs(got["loss"] - want) < 1e-3 and got["tokens"] == len(ids), (row, got, want, len(ids))


def test_any_split_is_the_same_step(keel, tiny_a, oracle, tmp_path):
    """Rows of very different length: a mean of micro-batch means would differ by several percent."""
    rows = [texts.TRAIN[0], texts.CHAT[1], texts.TRAIN[5], {"prompt": "noon", "completion": texts.ENGLISH}] * 3
    init, opts = start(oracle(tiny_a), tmp_path)
    runs = []
    for batch, accum in ((4, 1), (2, 2), (1, 4)):
        out, log = train(keel, tiny_a, rows, tmp_path, f"{batch}x{accum}.gguf", **{**opts, "batch": batch, "accum": accum, "steps": 3})
        runs.append((log, lora.read_gguf(out)[0]))
    want = lora.train(oracle(tiny_a), init, ALPHA, steps_of(rows, 4), [LR] * 3)
    for log, adapter in runs:
        same_losses(log, want)
        for a, b in zip(log, runs[0][0]):
            assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3
            assert a["tokens"] == b["tokens"]
        same_adapter(adapter, runs[0][1], init)


def test_optimizer_options(keel, tiny_a, oracle, tmp_path):
    kw = dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, clip=0.5)
    run_both(keel, tiny_a, oracle(tiny_a), tmp_path, texts.TRAIN[:10], 2, oracle_kw=kw, beta1=0.8, beta2=0.95, eps=1e-6,
             weight_decay=0.1, grad_clip=0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(keel, tiny_c, oracle, tmp_path, schedule):
    ref = oracle(tiny_c)
    _, log, _ = run_both(keel, tiny_c, ref, tmp_path, texts.TRAIN[:12], 1, schedule=schedule, warmup=4)
    lr = [r["lr"] for r in log]
    assert max(lr) <= LR * (1 + 1e-6) and lr[3] >= 0.75 * LR * (1 - 1e-6)
    rise = np.diff(lr[:4])
    assert (rise > 0).all() and np.ptp(rise) < 1e-3 * LR  # linear
    if schedule == "constant":
        assert np.allclose(lr[4:], LR)
    else:
        assert (np.diff(lr[5:]) < 0).all() and lr[-1] < 0.15 * LR
    if schedule == "linear":
        assert np.ptp(np.diff(lr[5:])) < 1e-3 * LR


LENGTHS = [{"prompt": "a", "completion": " stone" * (i + 1)} for i in range(6)]


def lengths(ref, rows=LENGTHS):
    return [len(lora.row_ids(ref.tok, r)[0]) for r in rows]


def test_every_row_once_an_epoch(keel, tiny_c, oracle, tmp_path):
    """Batch 1 and rows of distinct lengths: the logged token count tells which row was used. The first counts too."""
    want = lengths(oracle(tiny_c))
    assert len(set(want)) == 6
    run = lambda name, **o: [r["tokens"] for r in train(keel, tiny_c, LENGTHS, tmp_path, name, batch=1, rank=2, **o)[1]]
    assert run("o.gguf", epochs=2) == want * 2
    shuffled = run("s.gguf", epochs=2, no_shuffle=False, seed=5)
    assert sorted(shuffled[:6]) == sorted(want) and sorted(shuffled[6:]) == sorted(want)
    assert run("s2.gguf", epochs=2, no_shuffle=False, seed=5) == shuffled
    others = [run(f"s{s}.gguf", epochs=1, no_shuffle=False, seed=s) for s in (6, 7)]
    assert any(o != shuffled[:6] for o in others)


def test_weights_of_data_files(keel, tiny_c, oracle, tmp_path):
    """Rows are drawn in proportion to the weights: 3 to 1, whatever the files' sizes."""
    short, long = LENGTHS[:1] * 3, LENGTHS[5:] * 9
    a, b = write_rows(tmp_path / "a.jsonl", short), write_rows(tmp_path / "b.jsonl", long)
    from keelcli import read_log, train_args
    keel(*train_args(tiny_c, [f"{a}:3", f"{b}:1"], tmp_path / "w.gguf", batch=1, steps=40, rank=2, log=tmp_path / "l.jsonl", seed=4))
    n = lengths(oracle(tiny_c), [short[0], long[0]])
    used = [r["tokens"] for r in read_log(tmp_path / "l.jsonl")]
    assert set(used) == set(n)
    # Binomial with p = 0.75 and 40 draws has a deviation of 2.7; a stratified draw is exactly 30.
    assert 22 <= used.count(n[0]) <= 38


def test_fresh_adapter(keel, tiny_a, oracle, tmp_path):
    """A is Kaiming-uniform with a stream of its own for each tensor, B is zero; alpha is 2 x rank by default."""
    runs = [lora.read_gguf(train(keel, tiny_a, LENGTHS, tmp_path, f"{i}.gguf", rank=8, steps=1, lr=0, seed=s)[0])
            for i, s in enumerate((1, 1, 2))]
    cfg = oracle(tiny_a).config
    a, alpha = runs[0]
    assert alpha == 16 and len(a) == 7 * cfg.num_hidden_layers
    firsts = set()
    for (layer, t), (la, lb) in a.items():
        n_out, n_in = lora.dims(cfg, t)
        assert la.shape == (8, n_in) and lb.shape == (n_out, 8) and not lb.any()
        bound = n_in ** -0.5
        assert np.abs(la).max() <= bound and np.abs(la).max() > 0.9 * bound
        assert abs(la.std() / (bound / 3 ** 0.5) - 1) < 0.15  # 256 or more draws: deviation of the estimate is 3 %
        assert abs(la.mean()) < 5 * la.std() / la.size ** 0.5
        firsts.add((la / bound).round(5).ravel()[:4].tobytes())
    assert len(firsts) == len(a), "two tensors share a random stream"
    assert all((runs[1][0][k][0] == a[k][0]).all() for k in a)
    assert all((runs[2][0][k][0] != a[k][0]).any() for k in a)


def test_twice_the_same_bits(keel, tiny_a, tmp_path):
    one, log1 = train(keel, tiny_a, texts.TRAIN, tmp_path, "1.gguf", steps=4, rank=4)
    two, log2 = train(keel, tiny_a, texts.TRAIN, tmp_path, "2.gguf", steps=4, rank=4)
    assert one.read_bytes() == two.read_bytes()
    assert [(r["loss"], r["grad_norm"]) for r in log1] == [(r["loss"], r["grad_norm"]) for r in log2]


def test_training_helps(keel, tiny_a, tmp_path):
    """After training the rows are likelier, as `score --lora` sees it."""
    out, log = train(keel, tiny_a, texts.TRAIN[:4], tmp_path, steps=30, rank=8, lr=5e-3, batch=4)
    rows = [{"id": i, **r} for i, r in enumerate(texts.TRAIN[:4])]
    total = lambda *o: sum(r["logprob"] for r in score(keel, tiny_a, rows, tmp_path, *o))
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and total("--lora", out) > 0.6 * total()


@pytest.mark.full
def test_real_losses_and_gradients(keel, real, g270, tmp_path):
    from make_fixtures import gradient_digest
    fx = g270["lora"]
    from gemma3_ref import config_of, metadata
    import gguf
    reader = gguf.GGUFReader(str(real))
    cfg = config_of(metadata(reader), {t.name: t for t in reader.tensors})
    init = lora.random_adapter(cfg, fx["rank"], fx["seed"], b_std=fx["b_std"])
    lora.write_gguf(tmp_path / "init.gguf", init, fx["alpha"])
    o = {"init_adapter": tmp_path / "init.gguf", "rank": fx["rank"], "alpha": fx["alpha"], "batch": fx["batch"]}
    _, log = train(keel, real, fx["rows"], tmp_path, **o, lr=fx["lr"], steps=fx["steps"])
    for r, loss, norm in zip(log, fx["loss"], fx["grad_norm"], strict=True):
        print(r["step"], r["loss"], loss, r["grad_norm"], norm)
        assert abs(r["loss"] / loss - 1) < 0.01 and abs(r["grad_norm"] / norm - 1) < 0.02
    out, _ = train(keel, real, fx["rows"][:2], tmp_path, "g.gguf", **o, lr=1, eps=1, steps=1)
    got = {}
    for k, ab in lora.read_gguf(out)[0].items():
        u = [init[k][h].astype(np.float64) - ab[h] for h in (0, 1)]
        got[k] = [x / (1 - np.abs(x)) for x in u]
    digest, worst = gradient_digest(got), 0
    for name, (norm, proj) in fx["grads"].items():
        # A gradient off by e in a direction its norm does not see moves the projection by about e x norm.
        worst = max(worst, abs(digest[name][0] / norm - 1), abs(digest[name][1] - proj) / norm)
    print("worst gradient deviation", worst)
    assert worst < 0.02  # fp32 through 18 layers and a 262144-wide softmax on both sides
