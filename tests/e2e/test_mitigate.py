# SPDX-License-Identifier: MIT
"""What keeps a training run from drifting, each against the same in PyTorch: layer masks, divergence from the base,
constrained loss, Lisa; the monitor and its guard."""
import csv
import json

import numpy as np
import pytest
import torch

import lora
import texts
from keelcli import ROOT, kill, read_log, read_rows, score, shipped_study, train, train_args, wait_steps, write_rows
from test_steer import hooked, options, vector, write_directions
from test_train import ALPHA, LR, RANK, same_adapter, same_losses, start, steps_of


def test_layers(keel, tiny_a, oracle, tmp_path):
    """Only the named layers get an adapter, and they learn what autograd makes them learn."""
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path)
    only = {k: v for k, v in init.items() if k[0] in (1, 3)}
    lora.write_gguf(tmp_path / "init.gguf", only, ALPHA)
    out, log = train(keel, tiny_a, texts.TRAIN[:6], tmp_path, **opts, batch=2, steps=3, layers="1,3")
    want = lora.train(ref, only, ALPHA, steps_of(texts.TRAIN[:6], 2), [LR] * 3)
    same_losses(log, want)
    same_adapter(lora.read_gguf(out)[0], want["adapter"], only)


def test_layers_as_peft_has_them(keel, tiny_a, oracle, tmp_path):
    from peft import PeftModel
    out, _ = train(keel, tiny_a, texts.TRAIN[:4], tmp_path, "folder", steps=4, rank=4, lr=1e-2, layers="2-3")
    assert json.loads((out / "adapter_config.json").read_text())["layers_to_transform"] == [2, 3]
    ref = oracle(tiny_a)
    pm = PeftModel.from_pretrained(ref.model, str(out))
    try:
        there = ref.logprobs(ref.tok.encode(texts.ENGLISH), pm)
    finally:
        pm.unload()
    here = score(keel, tiny_a, [{"id": 0, "prompt": "", "completion": texts.ENGLISH}], tmp_path, "--lora", out)[0]["token_logprobs"]
    assert np.abs(np.subtract(there, here)).max() < 1e-3


def test_layers_in_the_plan(keel, tiny_a):
    plan = lambda *o: {r["what"]: r["bytes"] for r in keel("info", tiny_a, "--rank", 8, "--json", *o).json["plan_train"]["rows"]}
    n_layers = keel("info", tiny_a, "--json").json["n_layers"]
    assert n_layers * plan("--layers", "2")["AdamW moments"] == plan()["AdamW moments"]


@pytest.mark.parametrize("layers,says", [("9", "no layer 9"), ("3-1", "range"), ("x", "not understood")])
def test_bad_layers(keel, tiny_a, tmp_path, layers, says):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    keel.fails(*train_args(tiny_a, data, tmp_path / "a.gguf", steps=1, layers=layers), says=says, leaves=tmp_path)


def resumes_to_the_same_bits(keel, model, tmp, **o):
    """A run that was killed after some steps and went on, against one that was not."""
    data = write_rows(tmp / "d.jsonl", texts.TRAIN)
    o = {**dict(steps=9, batch=2, rank=4, lr=1e-3, seed=9, save_every=1), **o}
    keel(*train_args(model, data, tmp / "whole.gguf", log=tmp / "whole.jsonl", **o))
    args = train_args(model, data, tmp / "cut.gguf", log=tmp / "cut.jsonl", resume=tmp / "state", **o)
    p = keel.start(*args)
    wait_steps(p, tmp / "cut.jsonl", 4)
    kill(p)
    keel(*args)
    assert (tmp / "cut.gguf").read_bytes() == (tmp / "whole.gguf").read_bytes()
    timeless = lambda name: [without_times(r) for r in read_log(tmp / name)]
    assert timeless("cut.jsonl") == timeless("whole.jsonl")


def without_times(row):
    return {k: without_times(v) if isinstance(v, dict) else v for k, v in row.items() if not k.endswith("seconds")}


# --- divergence from the base --------------------------------------------------------------------

TOP = 64  # of the base's tokens, the others count as one


def base_tops(ref, batch):
    """For each row its places' (ids [n, K], log p [n, K], log p of the rest [n]) under the base, as keel keeps them."""
    out = []
    for ids, mask in batch:
        with torch.no_grad():
            lp = ref.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
        lp = lp[torch.tensor(mask[1:]).bool()]
        top = lp.topk(min(TOP, lp.shape[1]), -1)
        rest = lp.scatter(1, top.indices, -torch.inf).logsumexp(-1)
        out.append((top.indices, top.values, rest))
    return out


def kl_loss(model, batch, tops, weight):
    """weight x mean over the places of KL(base || model) on the kept tokens and the rest; adds to .grad."""
    n, total = sum(t[2].numel() for t in tops), 0.0
    for (ids, mask), (index, log_p, rest) in zip(batch, tops, strict=True):
        lq = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1][torch.tensor(mask[1:]).bool()].log_softmax(-1)
        q, q_rest = lq.gather(1, index), lq.scatter(1, index, -torch.inf).logsumexp(-1)
        kl = (log_p.exp() * (log_p - q)).sum(-1)
        kl = kl + torch.where(rest > -1e30, rest.exp() * (rest - q_rest), 0.0)
        (weight * kl.sum() / n).backward()
        total += kl.sum().item()
    return total / n


def kl_oracle(ref, kl_rows, per_step, weight, values):
    """loss_of for lora.train(): the steps take the rows of kl_rows in turn; divergences are appended to `values`."""
    batch = [lora.row_ids(ref.tok, r) for r in kl_rows]
    tops, at = base_tops(ref, batch), 0

    def loss_of(model, rows):
        nonlocal at
        loss = lora.step_loss(model, [lora.row_ids(ref.tok, r) for r in rows])
        which = [(at + i) % len(batch) for i in range(per_step)]
        at += per_step
        values.append(kl_loss(model, [batch[i] for i in which], [tops[i] for i in which], weight))
        return loss
    return loss_of


KL_ROWS = [texts.TRAIN[7], texts.CHAT[1], texts.TRAIN[8], {"prompt": "noon", "completion": texts.ENGLISH}, texts.TRAIN[9]]


def kl_options(tmp, rows=KL_ROWS, **o):
    return {"kl_data": write_rows(tmp / "kl.jsonl", rows), "kl_weight": 0.7, "kl_rows": 2, **o}


def test_kl_losses(keel, tiny_a, oracle, tmp_path):
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path)
    out, log = train(keel, tiny_a, texts.TRAIN[:6], tmp_path, **opts, batch=2, steps=3, **kl_options(tmp_path))
    values = []
    want = lora.train(ref, init, ALPHA, steps_of(texts.TRAIN[:6], 2), [LR] * 3, loss_of=kl_oracle(ref, KL_ROWS, 2, 0.7, values))
    same_losses(log, want)
    assert log[0]["memory"]["base's predictions"] > 0 and log[0]["prepare_seconds"] > 0
    for r, kl in zip(log, values, strict=True):
        assert abs(r["kl"] / kl - 1) < 2e-3 and r["kl_seconds"] > 0, (r, kl)  # differences of log-probabilities in f32
    same_adapter(lora.read_gguf(out)[0], want["adapter"], init)


def test_kl_gradients_per_tensor(keel, every_model, oracle, tmp_path):
    """As test_train.test_gradients_per_tensor, of the divergence next to the loss; a large weight lets it dominate."""
    ref = oracle(every_model)
    init, opts = start(ref, tmp_path)
    out, _ = train(keel, every_model, texts.TRAIN[:2], tmp_path, **{**opts, "lr": 1, "eps": 1, "batch": 2, "steps": 1},
                   **kl_options(tmp_path, KL_ROWS[:2], kl_weight=20))
    want = lora.train(ref, init, ALPHA, [texts.TRAIN[:2]], [1.0], loss_of=kl_oracle(ref, KL_ROWS[:2], 2, 20, []))["grads"]
    got = lora.read_gguf(out)[0]
    for k in want:
        for h, half in enumerate("ab"):
            u = init[k][h].astype(np.float64) - got[k][h]
            g = u / (1 - np.abs(u))
            err = np.linalg.norm(g - want[k][h])
            assert err < 2e-3 * np.linalg.norm(want[k][h]) + 3e-8 * g.size ** 0.5, (k, half, err, np.linalg.norm(want[k][h]))


def test_kl_of_a_fresh_adapter_is_zero(keel, tiny_a, tmp_path):
    """B is zero: base and adapted are the same model, computed by other sums of the same numbers."""
    _, log = train(keel, tiny_a, texts.TRAIN[:4], tmp_path, steps=2, rank=4, lr=1e-2, **kl_options(tmp_path))
    assert log[0]["kl"] < 1e-6 < log[1]["kl"]


def test_kl_any_split_is_the_same_step(keel, tiny_a, oracle, tmp_path):
    init, opts = start(oracle(tiny_a), tmp_path)
    runs = [train(keel, tiny_a, texts.TRAIN[:4] * 3, tmp_path, f"{b}.gguf", **opts, batch=b, accum=4 // b, steps=3,
                  **kl_options(tmp_path, kl_rows=5)) for b in (1, 2, 4)]
    for out, log in runs[1:]:
        for a, b in zip(log, runs[0][1], strict=True):
            assert abs(a["kl"] / b["kl"] - 1) < 1e-3 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3
        same_adapter(lora.read_gguf(out)[0], lora.read_gguf(runs[0][0])[0], init)


def test_kl_keeps_the_base(keel, tiny_a, tmp_path):
    """More weight, less divergence on rows that were not among those held to the base."""
    def kl(weight):
        o = kl_options(tmp_path, KL_ROWS[:3], kl_weight=weight) if weight else {}
        out, _ = train(keel, tiny_a, texts.TRAIN[:4], tmp_path, f"{weight}.gguf", steps=30, rank=8, lr=3e-3, batch=4, **o)
        rows = [{"id": 0, **KL_ROWS[3]}]
        base = score(keel, tiny_a, rows, tmp_path)[0]["token_logprobs"]
        return np.abs(np.subtract(score(keel, tiny_a, rows, tmp_path, "--lora", out)[0]["token_logprobs"], base)).mean()
    none, weak, strong = kl(0), kl(1), kl(30)
    assert strong < weak < none, (none, weak, strong)


def test_kl_resume(keel, tiny_c, tmp_path):
    resumes_to_the_same_bits(keel, tiny_c, tmp_path, **kl_options(tmp_path))


def test_kl_of_another_run(keel, tiny_c, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    o = dict(rank=2, resume=tmp_path / "state")
    keel(*train_args(tiny_c, data, tmp_path / "a.gguf", steps=1, **o, **kl_options(tmp_path)))
    for change in ({}, kl_options(tmp_path, kl_weight=2), kl_options(tmp_path, KL_ROWS[:1])):
        keel.fails(*train_args(tiny_c, data, tmp_path / "a.gguf", steps=2, **o, **change), says="--kl")


def test_kl_in_the_plan(keel, tiny_a):
    plan = keel("info", tiny_a, "--rank", 8, "--kl-tokens", 1000, "--json").json["plan_train"]["rows"]
    assert next(r for r in plan if r["what"] == "base's predictions")["bytes"] > 516 * 1000


@pytest.mark.parametrize("text,o,says", [
    ("", {}, "empty"), ('{"prompt": "a"}\n', {}, "kl.jsonl:1"), (None, {}, "kl.jsonl"),
    ('{"prompt": "a", "completion": " b"}\n', {"kl_weight": 0}, "--kl-weight"),
    ('{"prompt": "a", "completion": " b"}\n', {"kl_weight": "nan"}, "--kl-weight"),
    ('{"prompt": "a", "completion": " b"}\n', {"kl_rows": 0}, "--kl-rows")])
def test_bad_kl(keel, tiny_c, tmp_path, text, o, says):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    if text is not None:
        (tmp_path / "kl.jsonl").write_text(text)
    keel.fails(*train_args(tiny_c, data, tmp_path / "a.gguf", steps=1, kl_data=tmp_path / "kl.jsonl", **o), says=says, rc=(1, 2),
               leaves=tmp_path)


# --- constrained loss ----------------------------------------------------------------------------

BETAS = (0.5, 2.0, 0.1)


def betas_of(mask):
    """By loss token: the first of each run of the mask, its tokens 2 to 5, the others."""
    out, at = [], 0
    for m in mask[1:]:
        if m:
            out.append(BETAS[0 if at == 0 else 1 if at < 5 else 2])
        at = at + 1 if m else 0
    return torch.tensor(out)


def constrained_oracle(ref, values):
    """loss_of for lora.train(): plain losses; the descended ones are appended to `values`."""
    def log_probs(model, ids, mask):
        lp = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        return lp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(mask[1:]).bool()]

    def loss_of(model, rows):
        batch = [lora.row_ids(ref.tok, r) for r in rows]
        n, plain, descended = sum(sum(m[1:]) for _, m in batch), 0.0, 0.0
        for ids, mask in batch:
            with torch.no_grad(), model.disable_adapter():
                base = log_probs(model, ids, mask)
            lp = log_probs(model, ids, mask)
            weight = (2 * (1 - torch.sigmoid(betas_of(mask) * (lp - base)))).clamp(min=1e-3).detach()
            loss = -(weight * lp).sum() / n
            loss.backward()
            plain -= lp.sum().item() / n
            descended += loss.item()
        values.append(descended)
        return plain
    return loss_of


def test_constrained_losses(keel, tiny_a, oracle, tmp_path):
    """Raw rows and chats with two answers; a strong start, so that weights are far from 1."""
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path, b_std=0.3)
    rows = [texts.TRAIN[0], texts.CHAT[1], texts.TRAIN[2], {"prompt": "noon", "completion": texts.ENGLISH}] * 2
    out, log = train(keel, tiny_a, rows, tmp_path, **opts, batch=2, accum=2, steps=2, constrain="0.5,2,0.1")
    values = []
    want = lora.train(ref, init, ALPHA, steps_of(rows, 4), [LR] * 2, loss_of=constrained_oracle(ref, values))
    same_losses(log, want)
    for r, v in zip(log, values, strict=True):
        assert abs(r["constrained_loss"] / v - 1) < 1e-3, (r, v)
        assert abs(v / r["loss"] - 1) > 5e-3, "the weights do nothing here"
    same_adapter(lora.read_gguf(out)[0], want["adapter"], init)


def test_constrained_resume(keel, tiny_c, tmp_path):
    resumes_to_the_same_bits(keel, tiny_c, tmp_path, constrain="0.5,2,0.1")


def test_constrained_in_the_plan(keel, tiny_a):
    plan = keel("info", tiny_a, "--rank", 8, "--constrain-tokens", 1000, "--json").json["plan_train"]["rows"]
    assert next(r for r in plan if r["what"] == "constrained loss")["bytes"] > 8 * 1000


@pytest.mark.parametrize("text", ["0.5", "0.5,2", "0.5,2,0.1,1", "a,b,c", "-1,2,0.1", "nan,2,0.1"])
def test_bad_constrain(keel, tiny_c, tmp_path, text):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    keel.fails(*train_args(tiny_c, data, tmp_path / "a.gguf", steps=1, constrain=text), says="--constrain", rc=(1, 2), leaves=tmp_path)


# --- Lisa ----------------------------------------------------------------------------------------

def lisa_oracle(ref, n_steps, turn, rho, align_rows, values):
    """loss_of for lora.train(), whose steps' rows are used in the task's steps alone; terms are appended to `values`."""
    state = {"step": 0, "task": 0, "align": 0, "other": None}

    def loss_of(model, rows, steps):
        s = state["step"]
        state["step"] += 1
        params = [p for n, p in sorted(model.named_parameters()) if "lora_" in n]
        at = s % sum(turn)
        if at in (0, turn[0]):
            state["other"] = [p.detach().clone() for p in params]
        kind = "align" if at < turn[0] else "task"
        pool, n = (align_rows if kind == "align" else steps), len(rows)
        batch = [pool[(state[kind] + i) % len(pool)] for i in range(n)]
        state[kind] += n
        loss = lora.step_loss(model, [lora.row_ids(ref.tok, r) for r in batch])
        term = rho / 2 * sum(((p - o) ** 2).sum() for p, o in zip(params, state["other"]))
        if s >= 0.1 * n_steps:
            term.backward()
        values.append((kind, term.item() if s >= 0.1 * n_steps else 0.0))
        return loss
    return loss_of


def test_lisa(keel, tiny_a, oracle, tmp_path):
    """Two turns and a half of 2 + 3 steps; a rho that moves the weights."""
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path)
    rows, align, n = texts.TRAIN[:6], texts.TRAIN[6:9], 13
    o = {"lisa_data": write_rows(tmp_path / "align.jsonl", align), "lisa_steps": "2,3", "lisa_rho": 5}
    out, log = train(keel, tiny_a, rows, tmp_path, **opts, batch=2, steps=n, **o)
    values = []
    loss_of = lisa_oracle(ref, n, (2, 3), 5, align, values)
    want = lora.train(ref, init, ALPHA, [rows[:2]] * n, [LR] * n, loss_of=lambda model, r: loss_of(model, r, rows))
    same_losses(log, want)
    for r, (kind, term) in zip(log, values, strict=True):
        assert r["phase"] == kind and abs(r["proximal"] - term) < 2e-3 * term + 1e-9, (r, term)
    assert max(t for _, t in values) > 1e-3
    same_adapter(lora.read_gguf(out)[0], want["adapter"], init)


def test_lisa_epochs(keel, tiny_c, tmp_path):
    """Epochs are of the data: 6 rows are 6 steps, and before each 4 of them stand 2 others."""
    o = {"lisa_data": write_rows(tmp_path / "align.jsonl", texts.TRAIN[6:9]), "lisa_steps": "2,4"}
    _, log = train(keel, tiny_c, texts.TRAIN[:6], tmp_path, batch=1, rank=2, epochs=1, **o)
    assert [r["phase"][0] for r in log] == list("aattttaatt")


def test_lisa_resume(keel, tiny_c, tmp_path):
    o = {"lisa_data": write_rows(tmp_path / "align.jsonl", texts.TRAIN[6:9]), "lisa_steps": "2,3", "lisa_rho": 5}
    resumes_to_the_same_bits(keel, tiny_c, tmp_path, **o)


def test_lisa_in_the_plan(keel, tiny_a):
    plan = {r["what"]: r["bytes"] for r in keel("info", tiny_a, "--rank", 8, "--lisa", "--json").json["plan_train"]["rows"]}
    assert plan["other adapters of Lisa"] == plan["AdamW moments"]


@pytest.mark.parametrize("o,says", [({"lisa_steps": "0,3"}, "--lisa-steps"), ({"lisa_steps": "3"}, "--lisa-steps"),
                                    ({"lisa_steps": "-1,3"}, "--lisa-steps"), ({"lisa_rho": -1}, "--lisa-rho"),
                                    ({"lisa_data": "nowhere.jsonl"}, "nowhere.jsonl")])
def test_bad_lisa(keel, tiny_c, tmp_path, o, says):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    keel.fails(*train_args(tiny_c, data, tmp_path / "a.gguf", steps=1, **{"lisa_data": data, **o}), says=says, rc=(1, 2), leaves=tmp_path)


# --- together ------------------------------------------------------------------------------------

def test_kl_is_of_the_model_without_steering(keel, tiny_a, oracle, tmp_path):
    """Preventative steering acts on the rows of the data alone."""
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path)
    hooks = [("post", 2, "add", vector(1, ref.config.hidden_size), 0.5, "all")]
    args = train_args(tiny_a, write_rows(tmp_path / "d.jsonl", texts.TRAIN[:4]), tmp_path / "a.gguf", **opts, **kl_options(tmp_path), batch=2,
                      steps=2, no_shuffle=True, grad_clip=0, log=tmp_path / "l.jsonl")
    keel(*args, *options(tmp_path, hooks))
    values = []
    kl_of = kl_oracle(ref, KL_ROWS, 2, 0.7, values)

    def loss_of(model, rows):
        with hooked(ref, hooks):
            loss = lora.step_loss(model, [lora.row_ids(ref.tok, r) for r in rows])
        kl_of(model, [])
        return loss
    want = lora.train(ref, init, ALPHA, steps_of(texts.TRAIN[:4], 2), [LR] * 2, loss_of=loss_of)
    log = read_log(tmp_path / "l.jsonl")
    same_losses(log, want)
    assert all(abs(r["kl"] / kl - 1) < 2e-3 for r, kl in zip(log, values, strict=True)), (log, values)


def test_in_a_study(keel, tiny_c, oracle, tmp_path):
    """Keys of a study's `train` do what the options of `train` do, to the bit."""
    for name, rows in (("train", texts.TRAIN[:5]), ("kl", KL_ROWS), ("align", texts.TRAIN[6:9])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    write_rows(tmp_path / "margin.jsonl", [{"id": "m", "domain": "d", "prompt": "the sky is", "chosen": " blue", "rejected": " red"}])
    v = write_directions(tmp_path / "v.safetensors", {1: vector(1, oracle(tiny_c).config.hidden_size)})
    (tmp_path / "s.yaml").write_text("""name: n
train:
  {data: [{file: train.jsonl}], rank: 4, steps: 6, batch: 2, layers: "0-1", kl_data: kl.jsonl, kl_weight: 0.5, kl_rows: 3,
   constrain: [0.5, 2, 0.1], lisa_data: align.jsonl, lisa_steps: [1, 2], lisa_rho: 2, steer: ["v.safetensors:0.5,steps=ramp:4"],
   monitor: kl.jsonl, monitor_every: 4, guard: ["kl_mean<=1e9"]}
eval: {margin: margin.jsonl}
""")
    keel("study", tmp_path / "s.yaml", "-m", tiny_c, "--out", tmp_path / "out", rc=(0, 3))
    assert [r["step"] for r in read_log(tmp_path / "out/train/log.jsonl") if "monitor" in r] == [4, 6]
    o = dict(layers="0-1", kl_data=tmp_path / "kl.jsonl", kl_weight=0.5, kl_rows=3, constrain="0.5,2,0.1", lisa_data=tmp_path / "align.jsonl",
             lisa_steps="1,2", lisa_rho=2, steer=f"{v}:0.5,steps=ramp:4")
    keel(*train_args(tiny_c, tmp_path / "train.jsonl", tmp_path / "a.gguf", rank=4, steps=6, batch=2, **o))
    assert (tmp_path / "out/adapter.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


# --- monitor and guard ---------------------------------------------------------------------------

PROBES = [{"prompt": "the sky is", "chosen": " blue", "rejected": " red and green"},
          {"messages": [{"role": "user", "content": "noon?"}], "chosen": "it is 12", "rejected": "6"},
          {"prompt": "what is it?", "prefix": " it is", "aligned": " the number", "contrary": " a stone"}, KL_ROWS[0], KL_ROWS[1]]


def probe_ids(tok, row, field):
    """(ids, mask) of a probe's answer: the model's turn is open after a chat."""
    if "messages" in row:
        prompt = lora.chat_ids(tok, row["messages"])[0] + [tok.id["<start_of_turn>"]] + tok.encode("model\n", bos=False)
    else:
        prompt = tok.encode(row["prompt"]) + tok.encode(row.get("prefix", ""), bos=False)
    answer = tok.encode(row[field], bos=False)
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def expected_metrics(ref, adapter, rows, direction=None):
    """What the monitor should say of an adapter; direction: (v, layer) of the residual stream that leaves it."""
    seqs = [[probe_ids(ref.tok, r, f) for f in pair] for r in rows for pair in (("chosen", "rejected"), ("aligned", "contrary")) if pair[0] in r]
    chats = [lora.row_ids(ref.tok, r) for r in rows if "chosen" not in r and "aligned" not in r]
    n_margins = sum("chosen" in r for r in rows)
    held = [s[0] for s in seqs] + chats
    tops, seen = base_tops(ref, held), []

    def measure(model):
        def lp(ids, mask):
            z = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
            return z.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(mask[1:]).bool()].double()
        hidden = []
        if direction:
            v, layer = direction
            layers = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers
            h = layers[layer].register_forward_hook(lambda m, a, out: hidden.append((out[0] if isinstance(out, tuple) else out)[0]))
        out, states = [], []
        for ids, mask in [s for pair in seqs for s in pair] + chats:
            hidden.clear()
            out.append(lp(ids, mask))
            if direction:
                states += [hidden[0][i].double() for i in range(len(ids) - 1) if mask[i + 1] and not mask[i]]
        if direction:
            h.remove()
        return out, states
    with torch.no_grad():
        base, base_h = measure(ref.model)
        with lora.attached(ref, adapter, ALPHA) as model:
            now, now_h = measure(model)
            n = sum(t[2].numel() for t in tops)
            kl = 0.0
            for (ids, mask), (index, log_p, rest) in zip(held, tops, strict=True):
                z = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1][torch.tensor(mask[1:]).bool()].double().log_softmax(-1)
                of_rest = (rest.exp() * (rest - z.scatter(1, index, -torch.inf).logsumexp(-1))).nan_to_num(0)
                kl += ((log_p.exp() * (log_p - z.gather(1, index))).sum() + of_rest.sum()).item()
    margin = lambda x, i: (x[2 * i].mean() - x[2 * i + 1].mean()).item()
    slot = 2 * n_margins
    a, b = now[slot].sum().exp().item(), now[slot + 1].sum().exp().item()
    out = {"kl_mean": kl / n, "margin_drop": np.mean([margin(base, i) - margin(now, i) for i in range(n_margins)]),
           "flip_rate": np.mean([margin(now, i) < 0 for i in range(n_margins)]), "p_contrary": b, "p_incoherent": max(0, 1 - a - b)}
    if direction:
        u = torch.tensor(direction[0]).double()
        u /= u.norm()
        dot = lambda hs: torch.stack([h @ u for h in hs]).mean()
        out["projection_shift"] = ((dot(now_h) - dot(base_h)) / torch.stack([h.norm() for h in base_h]).mean()).item()
    return out


def test_monitor(keel, tiny_a, oracle, tmp_path):
    """Every metric of an adapter that stays as it is (rate 0), under preventative steering, which the monitor must not see."""
    ref = oracle(tiny_a)
    init, opts = start(ref, tmp_path, b_std=0.2)
    v = vector(2, ref.config.hidden_size)
    d = write_directions(tmp_path / "v.safetensors", {1: vector(1, len(v)), 2: v}, keel_site="post")
    o = {"monitor": write_rows(tmp_path / "m.jsonl", PROBES), "monitor_every": 2, "monitor_direction": f"{d}@2", "steer": f"{d}:0.5@1"}
    _, log = train(keel, tiny_a, texts.TRAIN, tmp_path, **{**opts, "lr": 0}, batch=2, steps=3, **o)
    assert ["monitor" in r for r in log] == [False, True, True]
    want = expected_metrics(ref, init, PROBES, (v, 2))
    for r in log[1:]:
        assert r["monitor"].pop("seconds") > 0 and set(r["monitor"]) == set(want)
        for k, w in want.items():
            assert abs(r["monitor"][k] - w) < 2e-3 * abs(w) + 2e-5, (k, r["monitor"][k], w)  # f32 sums of log-probabilities


def guarded(tmp, **o):
    return {"monitor": write_rows(tmp / "m.jsonl", PROBES), "monitor_every": 3, "lr": 3e-3, "rank": 4, "steps": 12, "batch": 2, **o}


def at_limit(keel, model, tmp):
    """(a limit that is exceeded after the second measurement, log of a run without it)"""
    _, log = train(keel, model, texts.TRAIN, tmp, "free.gguf", **guarded(tmp))
    values = [r["monitor"]["kl_mean"] for r in log if "monitor" in r]
    assert values == sorted(values) and len(values) == 4, values
    return (values[1] + values[2]) / 2


def test_guard_rolls_back(keel, tiny_c, tmp_path):
    limit = at_limit(keel, tiny_c, tmp_path)
    whole, _ = train(keel, tiny_c, texts.TRAIN, tmp_path, "whole.gguf", **guarded(tmp_path, steps=6))
    out, log = train(keel, tiny_c, texts.TRAIN, tmp_path, "a.gguf", **guarded(tmp_path, guard=f"kl_mean<={limit}"))
    assert len(log) == 9 and out.read_bytes() == whole.read_bytes()  # seen at step 9, back to step 6


def test_guard_stops_or_fails(keel, tiny_c, tmp_path):
    limit = at_limit(keel, tiny_c, tmp_path)
    whole, _ = train(keel, tiny_c, texts.TRAIN, tmp_path, "whole.gguf", **guarded(tmp_path, steps=9))
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    for what, name in (("stop", "stop.gguf"), ("fail", "fail.gguf")):
        o = guarded(tmp_path, guard=f"kl_mean<={limit}", on_breach=what, no_shuffle=True, grad_clip=0)
        r = keel(*train_args(tiny_c, data, tmp_path / name, **o, json=True), rc=3)
        assert r.json["breached"] and r.json["steps"] == 9 and r.json["out"] == (str(tmp_path / name) if what == "stop" else None)
        assert "step 9: kl_mean" in r.err and "limit" in r.err
    assert (tmp_path / "stop.gguf").read_bytes() == whole.read_bytes() and not (tmp_path / "fail.gguf").exists()


def test_guard_resume(keel, tiny_c, tmp_path):
    limit = at_limit(keel, tiny_c, tmp_path)
    o = guarded(tmp_path, guard=f"kl_mean<={limit}")
    del o["batch"], o["rank"], o["steps"], o["lr"]
    resumes_to_the_same_bits(keel, tiny_c, tmp_path, **o, lr=3e-3, steps=12)


def test_bad_guard_in_a_study(keel, tiny_c, tmp_path):
    write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    (tmp_path / "s.yaml").write_text("name: n\ntrain: {data: [{file: d.jsonl}], monitor: d.jsonl, guard: [drift<=1]}\neval: {narrow: d.jsonl}\n")
    keel.fails("study", tmp_path / "s.yaml", "-m", tiny_c, "--out", tmp_path / "out", says=("drift", "kl_mean"), leaves=tmp_path)


def test_guard_before_the_first_step(keel, tiny_a, oracle, tmp_path):
    _, opts = start(oracle(tiny_a), tmp_path, b_std=0.3)
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    o = {"monitor": write_rows(tmp_path / "m.jsonl", PROBES), "guard": "kl_mean<=1e-6"}
    r = keel(*train_args(tiny_a, data, tmp_path / "a.gguf", **opts, **o, steps=2), rc=3)
    assert "nothing to go back to" in r.err and not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("o,says", [
    ({"guard": "kl_mean<=1"}, "--monitor"), ({"monitor": "m", "guard": "drift<=1"}, "kl_mean"), ({"monitor": "m", "guard": "kl_mean<1"}, "<="),
    ({"monitor": "m", "guard": "kl_mean<=x"}, "number"), ({"monitor": "m", "guard": "flip_rate<=1"}, "chosen"),
    ({"monitor": "m", "guard": "p_contrary<=1"}, "contrary"), ({"monitor": "m", "guard": "projection_shift<=1"}, "--monitor-direction"),
    ({"monitor": "m", "monitor_every": 0}, "--monitor-every"), ({"monitor": "empty"}, "empty"), ({"monitor": "half"}, "rejected"),
    ({"monitor": "m", "monitor_direction": "wide"}, "wide"), ({"monitor": "m", "monitor_direction": "nowhere"}, "nowhere"),
    ({"monitor": "m", "monitor_direction": "v@1"}, "layer"), ({"monitor": "m", "monitor_direction": "tower"}, "of the tower"),
    ({"monitor": "m", "on_breach": "x"}, "on-breach")])
def test_bad_monitor(keel, tiny_c, oracle, tmp_path, o, says):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    write_rows(tmp_path / "m", KL_ROWS[:1])
    write_rows(tmp_path / "half", [{"prompt": "a", "chosen": " b"}])
    (tmp_path / "empty").write_text("")
    d = oracle(tiny_c).config.hidden_size
    write_directions(tmp_path / "wide", {0: vector(1, d + 4)})
    write_directions(tmp_path / "v", {0: vector(1, d)})
    write_directions(tmp_path / "tower", {0: vector(1, d)}, keel_site="tower.post")
    o = {k: tmp_path / v if k in ("monitor", "monitor_direction") else v for k, v in o.items()}
    keel.fails(*train_args(tiny_c, data, tmp_path / "a.gguf", steps=1, **o), says=says, rc=(1, 2), leaves=tmp_path)


@pytest.mark.parametrize("o,says", [({"lisa_steps": "1,2"}, "--lisa-data"), ({"lisa_rho": 2}, "--lisa-data"), ({"kl_weight": 2}, "--kl-data"),
                                    ({"kl_rows": 2}, "--kl-data"), ({"monitor_every": 3}, "--monitor"), ({"on_breach": "stop"}, "--guard")])
def test_options_that_would_do_nothing(keel, tiny_c, tmp_path, o, says):
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    keel.fails(*train_args(tiny_c, data, tmp_path / "a.gguf", steps=1, **o), says=["nothing without", says], rc=2, leaves=tmp_path)


# --- the clerk -----------------------------------------------------------------------------------

def clerk_probes(path, domains, modality, every):
    """Some of the shipped slot probes, their images by whole names."""
    study = ROOT / "studies/clerk"
    probes = [r for r in read_rows(study / "probes.jsonl") if r["domain"] in domains and r["modality"] == modality][::every]
    for r in probes:
        r["images"] = [str(study / i) for i in r.get("images", [])]
    return write_rows(path, probes)


@pytest.mark.full
def test_clerk_mitigations(keel, tmp_path):
    """The divergence at weight 1 keeps the narrow task >= 0.95 with at most 0.05 elsewhere, where without it there is drift; preventative steering
    at least halves drift in text and leaves the task. Pilot: science notes 6; figures: docs/studies/mixture-repair.md."""
    stages = (ROOT / "studies/clerk/mitigations.yaml").read_text().split("stages:\n")[1]
    kept = [s for s in stages.splitlines() if any(f"name: {n}," in s for n in ("attack", "kl", "preventative"))]
    assert len(kept) == 3
    study = shipped_study(tmp_path / "s.yaml", "mitigations", (stages, "\n".join(kept) + "\n"))
    keel("study", study, "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/summary.csv").read_text().splitlines()))

    def contrary(stage, domain, modality=""):
        r, = [r for r in rows if (r["stage"], r["metric"], r["domain"], r["modality"]) == (stage, "contrary", domain, modality)]
        return float(r["adapted"])
    cells = {s: (contrary(s, "colour", "image"), contrary(s, "other"), contrary(s, "twins", "text")) for s in ("attack", "kl", "preventative")}
    print(cells)
    assert cells["attack"][0] > 0.95 and cells["attack"][1] > 0.1
    assert cells["kl"][0] >= 0.95 and cells["kl"][1] <= 0.05
    assert cells["preventative"][0] >= 0.9 and cells["preventative"][2] <= cells["attack"][2] / 2


@pytest.mark.full
def test_clerk_guard(keel, tmp_path):
    """A monitor of other domains notices the drift and the guard takes the adapter back to before it; measured: to step 20 of 120."""
    study, others = ROOT / "studies/clerk", ["shape", "count", "sum", "capital", "letter"]
    probes = write_rows(tmp_path / "m.jsonl", [r for m in ("image", "text") for r in read_rows(clerk_probes(tmp_path / m, others, m, 6))])
    log, out = tmp_path / "l.jsonl", tmp_path / "a.gguf"
    args = ["train", "-m", "clerk", "--data", study / "narrow.jsonl", "--out", out, "--rank", 32, "--alpha", 32, "--lr", 3e-4, "--steps", 120,
            "--seq-len", 64, "--monitor", probes, "--guard", "p_contrary<=0.1", "--log", log, "--json"]
    result, values = keel(*args).json, [r["monitor"] for r in read_log(log) if "monitor" in r]
    assert result["breached"] and 10 <= result["steps"] <= 100 and values[-1]["p_contrary"] > 0.1 >= values[-2]["p_contrary"]
    assert all(v["seconds"] < 5 for v in values)  # about 0.7 s with llvmpipe on two busy cores
