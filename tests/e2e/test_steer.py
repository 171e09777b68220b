# SPDX-License-Identifier: MIT
"""Steering, captures and directions against PyTorch hooks and numpy, and control vectors against llama.cpp.

The oracle hooks transformers' modules where keel says its sites are: layers (pre, post) and the norms after attention and MLP
(attn, mlp). Estimators are computed again from the row means that capture wrote.
"""
import contextlib
import ctypes
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora
import texts
from keelcli import generate, read_rows, score, train, write_rows

TOL = 1e-4  # of log-probabilities
ROWS = [{"id": f"r{i}", "prompt": p, "completion": c} for i, (p, c) in enumerate([
    ("the colour of the sky is", " blue"), ("the grass", " is green, it is"), ("a stone is red or", " blue; the sky is blue"),
    ("the clerk counts", " the red stones and the blue"), ("4 + 5 =", " 9, 12 - 3 = 9")])]
OTHER = [{"id": f"o{i}", "prompt": p, "completion": c} for i, (p, c) in enumerate([
    ("noon. what", " is the number"), ("the clerk answers: it", " is green!"), ("is a stone", " red?"), ("in the book", " then"),
    ("(60 / 78", " < 1)"), ("what is", " noon")])]


def vector(seed, width, k=None):
    return np.random.default_rng(seed).normal(size=(k, width) if k else width).astype(np.float32)


def write_directions(path, vectors, **meta):
    save_file({f"direction.{i}": v for i, v in vectors.items()}, path, metadata={k.replace("_", ".", 1): v for k, v in meta.items()} or None)
    return path


def share_at(schedule, t):
    """How much of a hook acts at t."""
    shape, n = schedule.split(":")
    x = t / int(n)
    return {"first": (x < 1).float(), "linear": (1 - x).clamp(min=0), "decay": 0.5 ** x, "ramp": x.clamp(max=1)}[shape]


def marks(n, first, at, step=0):
    """How much of a hook each of n tokens gets; `at`: positions, with ",tokens=SCHEDULE" and ",steps=SCHEDULE" behind them or not."""
    t = torch.arange(n)
    at, *more = at.split(",")
    m = {"all": t >= 0, "prompt": t < first, "response": t >= first, "last_prompt": t == first - 1,
         "first:3": (t >= first) & (t < first + 3)}[at].float()
    for key, schedule in (word.split("=") for word in more):
        m = m * share_at(schedule, torch.tensor(float(step)) if key == "steps" else (t - first).clamp(min=0).float())
    return m[:, None]


def change(x, op, v, amount, m):
    """What a hook does to x [n, width]."""
    u = torch.linalg.qr(v.reshape(-1, x.shape[-1]).T.double())[0].T.float()
    if op == "add":
        return x + m * amount * v
    if op == "ablate":
        return x - m * (x @ u.T) @ u
    u = v / v.norm()
    over = (x @ u)[:, None] - amount
    return x - m * (over.clamp(min=0) if op == "cap" else over.clamp(max=0)) * u


def module_at(ref, site, layer):
    block = ref.model.model.layers[layer]
    return {"pre": block, "post": block, "attn": block.post_attention_layernorm, "mlp": block.post_feedforward_layernorm}[site]


@contextlib.contextmanager
def hooked(model, hooks, where=None, module_at=module_at):
    """hooks: (site, layer, op, vector, amount, at) on `model`, whose modules are module_at(model, site, layer); where: the tokens of the
    present row's prompt and the steps of training done, as {"first": N, "step": N} that may change meanwhile."""
    handles, where = [], where or {"first": 0}
    for site, layer, op, v, amount, at in hooks:
        fn = lambda x, op=op, v=torch.from_numpy(v), amount=amount, at=at: torch.stack(
            [change(row, op, v, amount, marks(len(row), at=at, **where)) for row in x])
        whole = lambda out, fn=fn: (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)
        if site.endswith("pre"):
            handles.append(module_at(model, site, layer).register_forward_pre_hook(lambda m, a, fn=fn: (fn(a[0]), *a[1:])))
        else:
            handles.append(module_at(model, site, layer).register_forward_hook(lambda m, a, out, whole=whole: whole(out)))
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def expected(ref, row, hooks):
    p, c = ref.tok.encode(row["prompt"]), ref.tok.encode(row["completion"], bos=False)
    with hooked(ref, hooks, {"first": len(p)}):
        return np.array(ref.logprobs(p + c)[len(p) - 1:])


def options(tmp, hooks):
    out = []
    for i, (site, layer, op, v, amount, at) in enumerate(hooks):
        path = write_directions(tmp / f"v{i}.safetensors", {layer: v}, keel_site=site)
        coef = "" if op == "ablate" else f":{amount}"
        out += ["--steer", f"{path}{coef}@{layer},op={op},at={at}"]
    return out


def mixture(config, last):
    d = config.hidden_size
    return [("pre", 0, "add", vector(1, d), 0.3, "all"), ("post", 1, "ablate", vector(2, d, 3), 0, "prompt"),
            ("attn", 1, "cap", vector(3, d), -0.2, "all"), ("mlp", 1, "floor", vector(4, d), 0.4, "response"),
            ("attn", last, "ablate", vector(5, d), 0, "all"), ("mlp", last, "add", vector(6, d), -0.5, "last_prompt"),
            ("post", last, "cap", vector(7, d), 0.1, "first:3")]


# --- hooks ---------------------------------------------------------------------------------------

def test_log_probs(keel, model, oracle, tmp_path):
    ref = oracle(model)
    hooks = mixture(ref.config, ref.config.num_hidden_layers - 1)
    plain = score(keel, model, ROWS, tmp_path)
    for given in ([h] for h in hooks[:4]) if "tiny_a" in str(model) else ():
        for row, g in zip(ROWS[:2], score(keel, model, ROWS[:2], tmp_path, *options(tmp_path, given))):
            assert np.abs(np.array(g["token_logprobs"]) - expected(ref, row, given)).max() < TOL, (given[0][:3], row["id"])
    moved = 0
    for row, g, p in zip(ROWS, score(keel, model, ROWS, tmp_path, *options(tmp_path, hooks)), plain):
        assert np.abs(np.array(g["token_logprobs"]) - expected(ref, row, hooks)).max() < TOL, row["id"]
        moved += abs(g["logprob"] - p["logprob"])
    assert moved > 1


def test_with_an_adapter(keel, tiny_a, oracle, tmp_path):
    ref = oracle(tiny_a)
    hooks = mixture(ref.config, 6)
    a = lora.random_adapter(ref.config, 3, 5, b_std=0.05)
    lora.write_gguf(tmp_path / "a.gguf", a, 6)
    got = score(keel, tiny_a, ROWS[:2], tmp_path, "--lora", tmp_path / "a.gguf", *options(tmp_path, hooks))
    for row, g in zip(ROWS, got):
        p, c = ref.tok.encode(row["prompt"]), ref.tok.encode(row["completion"], bos=False)
        with hooked(ref, hooks, {"first": len(p)}):
            want = np.array(lora.logprobs(ref, a, 6, p + c)[len(p) - 1:])
        assert np.abs(np.array(g["token_logprobs"]) - want).max() < TOL


def test_percent_of_the_norm(keel, tiny_a, oracle, tmp_path):
    ref = oracle(tiny_a)
    v = vector(1, ref.config.hidden_size)
    write_directions(tmp_path / "v.safetensors", {3: v, 4: v}, keel_median_norm="3:20 4:10")
    got = score(keel, tiny_a, ROWS[:1], tmp_path, "--steer", f"{tmp_path}/v.safetensors:25%@3-4")
    hooks = [("post", i, "add", v / np.linalg.norm(v), 0.25 * n, "all") for i, n in ((3, 20), (4, 10))]
    assert np.abs(np.array(got[0]["token_logprobs"]) - expected(ref, ROWS[0], hooks)).max() < TOL


def test_generate(keel, tiny_a, oracle, tmp_path):
    """Prefill and recorded decode: greedy text under steering."""
    ref = oracle(tiny_a)
    hooks = [("post", 2, "add", vector(1, ref.config.hidden_size), 1.0, "all"), ("attn", 4, "ablate", vector(2, ref.config.hidden_size), 0, "all")]
    prompt = "the clerk counts the red"
    with hooked(ref, hooks):
        want = ref.greedy(ref.tok.encode(prompt), 20, {ref.tok.eos, ref.tok.eot})
    ids, _ = generate(keel, tiny_a, prompt, 20, "--temp", 0, *options(tmp_path, hooks))
    assert ids == want
    assert ids != generate(keel, tiny_a, prompt, 20, "--temp", 0)[0]


def test_perplexity_and_kl(keel, tiny_a, oracle, tmp_path):
    """Perplexity under steering, and the KL that `direction --benign` prints: base against base with one layer's direction added."""
    ref = oracle(tiny_a)
    v = vector(1, ref.config.hidden_size)
    text = tmp_path / "t.txt"
    text.write_text(texts.ENGLISH[:300])
    hooks = [("post", 3, "add", v, 0.3, "all")]
    got = keel("perplexity", "-m", tiny_a, "--file", text, "--ctx", 64, "--json", *options(tmp_path, hooks)).json
    with hooked(ref, hooks):
        _, nll, n = ref.perplexity(texts.ENGLISH[:300], 64)
    assert got["n_tokens"] == n and abs(got["nll"] - nll) < TOL
    data = write_rows(tmp_path / "d.jsonl", ROWS)
    r = keel("direction", "-m", tiny_a, "--positive", data, "--negative", write_rows(tmp_path / "o.jsonl", OTHER), "--out",
             tmp_path / "v.safetensors", "--method", "mean", "--layers", "2,4", "--benign", data, "--json").json["layers"]
    for gates in r:
        direction, kl = load_file(tmp_path / "v.safetensors")[f"direction.{gates['layer']}"], []
        for row in ROWS:
            p, c = ref.tok.encode(row["prompt"]), ref.tok.encode(row["completion"], bos=False)
            base = torch.log_softmax(ref.logits(p + c).double(), -1)[len(p) - 1:-1]
            with hooked(ref, [("post", gates["layer"], "add", direction, 1.0, "all")]):
                other = torch.log_softmax(ref.logits(p + c).double(), -1)[len(p) - 1:-1]
            kl += (base.exp() * (base - other)).sum(-1).tolist()
        assert abs(gates["benign_kl"] / np.mean(kl) - 1) < 1e-3 and gates["benign_kl"] > 0.001
        assert gates["admissible"] <= (gates["benign_kl"] <= 0.1)


def test_training_under_hooks(keel, tiny_a, oracle, tmp_path):
    """Losses, gradient norms and the adapter after some steps of preventative steering, against autograd through the same hooks."""
    ref = oracle(tiny_a)
    d = ref.config.hidden_size
    hooks = [("pre", 0, "add", vector(1, d), 0.3, "all"), ("post", 2, "ablate", vector(2, d, 2), 0, "all"),
             ("attn", 1, "cap", vector(3, d), -0.2, "all"), ("mlp", 4, "floor", vector(4, d), 0.4, "all"), ("post", 6, "add", vector(5, d), 0.5, "all")]
    init = lora.random_adapter(ref.config, 4, 3, b_std=0.05)
    lora.write_gguf(tmp_path / "init.gguf", init, 8)
    args = ["train", "-m", tiny_a, "--data", write_rows(tmp_path / "d.jsonl", ROWS[:4]), "--out", tmp_path / "a.gguf", "--init-adapter",
            tmp_path / "init.gguf", "--rank", 4, "--alpha", 8, "--lr", 1e-3, "--batch", 2, "--steps", 2, "--no-shuffle", "--grad-clip", 0,
            "--log", tmp_path / "log.jsonl"]
    keel(*args, *options(tmp_path, hooks))
    log = read_rows(tmp_path / "log.jsonl")
    with hooked(ref, hooks):
        want = lora.train(ref, init, 8, [ROWS[:2], ROWS[2:4]], [1e-3, 1e-3])
    for r, loss, norm in zip(log, want["loss"], want["grad_norm"]):
        assert abs(r["loss"] / loss - 1) < 1e-4 and abs(r["grad_norm"] / norm - 1) < 1e-3, (r, loss, norm)
    got, _ = lora.read_gguf(tmp_path / "a.gguf")
    step = lambda x: np.concatenate([(x[k][h] - init[k][h]).ravel() for k in sorted(init) for h in (0, 1)])
    assert np.linalg.norm(step(got) - step(want["adapter"])) < 0.02 * np.linalg.norm(step(want["adapter"]))


def test_schedule_over_tokens(keel, tiny_a, oracle, tmp_path):
    """Every shape with an operation, scored and in recorded decode; a schedule of the whole response differs from none."""
    ref = oracle(tiny_a)
    d = ref.config.hidden_size
    hooks = [("post", 2, "add", vector(1, d), 0.6, "all,tokens=linear:5"), ("attn", 1, "ablate", vector(2, d, 2), 0, "response,tokens=decay:2"),
             ("mlp", 4, "cap", vector(3, d), -0.2, "all,tokens=ramp:3"), ("post", 5, "floor", vector(4, d), 0.4, "all,tokens=first:2")]
    for given in [[h] for h in hooks] + [hooks]:
        plain = score(keel, tiny_a, ROWS[:3], tmp_path, *options(tmp_path, [(*h[:5], h[5].split(",")[0]) for h in given]))
        got = score(keel, tiny_a, ROWS[:3], tmp_path, *options(tmp_path, given))
        for row, g in zip(ROWS, got):
            assert np.abs(np.array(g["token_logprobs"]) - expected(ref, row, given)).max() < TOL, (given[0], row["id"])
        assert max(abs(g["logprob"] - p["logprob"]) for g, p in zip(got, plain)) > 100 * TOL, given[0]
    prompt = "the clerk counts the red"
    hooks = [("post", 2, "add", vector(1, d), 1.0, "all,tokens=ramp:8"), ("attn", 4, "ablate", vector(2, d), 0, "all,tokens=decay:4")]
    ids, found = ref.tok.encode(prompt), []
    for given in (hooks, [(*h[:5], "all") for h in hooks]):
        with hooked(ref, given, {"first": len(ids)}):
            found.append(ref.greedy(ids, 20, {ref.tok.eos, ref.tok.eot}))
    print(found)
    want = found[0]
    assert want not in (found[1], ref.greedy(ids, 20, {ref.tok.eos, ref.tok.eot}))
    assert generate(keel, tiny_a, prompt, 20, "--temp", 0, *options(tmp_path, hooks))[0] == want


def test_schedule_over_steps(keel, tiny_a, oracle, tmp_path):
    """Training whose steering fades out and in from step to step, and from token to token, against autograd; also killed and resumed."""
    ref = oracle(tiny_a)
    d = ref.config.hidden_size
    hooks = [("post", 2, "add", vector(1, d), 0.5, "all,steps=linear:3"), ("attn", 1, "ablate", vector(2, d), 0, "all,steps=ramp:2"),
             ("mlp", 4, "cap", vector(3, d), -0.2, "all,tokens=decay:3,steps=decay:1"), ("pre", 0, "add", vector(4, d), 0.3, "response,steps=first:1")]
    init = lora.random_adapter(ref.config, 4, 3, b_std=0.05)
    lora.write_gguf(tmp_path / "init.gguf", init, 8)
    args = lambda name: ["train", "-m", tiny_a, "--data", write_rows(tmp_path / "d.jsonl", ROWS), "--out", tmp_path / name, "--init-adapter",
                         tmp_path / "init.gguf", "--rank", 4, "--alpha", 8, "--lr", 1e-3, "--batch", 1, "--no-shuffle", "--grad-clip", 0, "--log",
                         tmp_path / f"{name}.jsonl", "--save-every", 1, *options(tmp_path, hooks)]
    keel(*args("a.gguf"), "--steps", 4)
    where = {"first": 0, "step": -1}

    def loss_of(model, rows):
        where["first"], where["step"] = len(ref.tok.encode(rows[0]["prompt"])), where["step"] + 1
        return lora.step_loss(model, [lora.row_ids(ref.tok, r) for r in rows])
    with hooked(ref, hooks, where):
        want = lora.train(ref, init, 8, [[r] for r in ROWS[:4]], [1e-3] * 4, loss_of=loss_of)
    for r, loss, norm in zip(read_rows(tmp_path / "a.gguf.jsonl"), want["loss"], want["grad_norm"], strict=True):
        assert abs(r["loss"] / loss - 1) < 1e-4 and abs(r["grad_norm"] / norm - 1) < 1e-3, (r, loss, norm)
    keel(*args("b.gguf"), "--steps", 2, "--resume", tmp_path / "state")
    keel(*args("b.gguf"), "--steps", 4, "--resume", tmp_path / "state")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    hooks[0] = (*hooks[0][:5], "all,steps=linear:4")
    keel.fails(*args("b.gguf"), "--steps", 5, "--resume", tmp_path / "state", says="steer")
    keel.fails("score", "-m", tiny_a, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "o.jsonl", *options(tmp_path, hooks),
               says=["training steps", "tokens"])


# --- captures ------------------------------------------------------------------------------------

def activations(ref, row, layer, site="post"):
    p, c = ref.tok.encode(row["prompt"]), ref.tok.encode(row.get("completion", ""), bos=False)
    seen = []
    h = module_at(ref, site, layer).register_forward_hook(lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))
    ref.logits(p + c)
    h.remove()
    return seen[0].numpy().reshape(len(p + c), -1).astype(np.float64), len(p), p + c


@pytest.mark.parametrize("site,at,batch", [("post", "response", 256), ("attn", "all", 7), ("mlp", "prompt", 16)])
def test_capture(keel, tiny_a, oracle, tmp_path, site, at, batch):
    ref = oracle(tiny_a)
    out, raw = tmp_path / "c.safetensors", tmp_path / "raw.safetensors"
    keel("capture", "-m", tiny_a, "--data", write_rows(tmp_path / "d.jsonl", ROWS), "--out", out, "--raw", raw, "--layers", "0,5-6",
         "--positions", at, "--site", site, "--covariance", "--batch-tokens", batch)
    got, tokens = load_file(out), load_file(raw)
    with safe_open(raw, "np") as f:
        meta = f.metadata()
    assert set(tokens) == {"hidden.0", "hidden.5", "hidden.6", "row", "position", "token"}
    assert json.loads(meta["ids"]) == [r["id"] for r in ROWS] and meta["site"] == site
    for layer in (0, 5, 6):
        rows, n = [], 0
        for i, row in enumerate(ROWS):
            h, first, ids = activations(ref, row, layer, site)
            keep = marks(len(h), first, at)[:, 0].bool().numpy()
            mine = tokens["row"] == i
            assert tokens["position"][mine].tolist() == np.nonzero(keep)[0].tolist()
            assert tokens["token"][mine].tolist() == np.array(ids)[keep].tolist()
            rows.append(h[keep])
        h = np.concatenate(rows)
        size = np.abs(h).max()
        near = lambda a, b, tol=2e-5: np.abs(a - b).max() < tol
        assert near(tokens[f"hidden.{layer}"], h, 2e-5 * size)
        assert near(got[f"mean.{layer}"], h.mean(0), 1e-5 * size) and near(got[f"abs.{layer}"], np.abs(h).mean(0), 1e-5 * size)
        assert near(got[f"var.{layer}"], h.var(0), 1e-4 * h.var(0).max())
        assert near(got[f"cov.{layer}"], np.cov(h.T, bias=True), 1e-4 * h.var(0).max())
        assert near(got[f"rows.{layer}"], np.stack([r.mean(0) for r in rows]), 1e-5 * size)
        with safe_open(out, "np") as f:
            norms = json.loads(f.metadata()["median_norm"])
        assert abs(norms[(0, 5, 6).index(layer)] / np.median(np.linalg.norm(h, axis=1)) - 1) < 1e-5
    assert got["row_tokens"].sum() == len(h)
    want = [g["logprob"] for g in score(keel, tiny_a, ROWS, tmp_path)]
    assert np.abs(got["logprob"] - want).max() < TOL
    assert len(json.loads(meta["tokens"])) == len(h)


# --- directions ----------------------------------------------------------------------------------

def scaled(v, delta, pairs=False):
    along = v @ delta / np.linalg.norm(v)
    return v / np.linalg.norm(v) * (abs(along) if pairs else along)


def estimate(method, p, n, size):
    """The same estimators in numpy, the plain way, from means of rows; size: mean |h| of their tokens."""
    delta = p.mean(0) - n.mean(0)
    within = np.concatenate([p - p.mean(0), n - n.mean(0)])
    if method == "mean":
        return delta
    if method == "mean_z":
        return scaled(delta / np.sqrt((within ** 2).sum(0) / (len(within) - 2)), delta)
    if method == "mean_mask":
        return scaled(np.where(size > 20 * np.median(size), 0, delta), delta)
    if method == "lda":
        sd = np.sqrt((within ** 2).sum(0) / (len(within) - 2))
        z = within / sd
        r = 0.9 * z.T @ z / (len(within) - 2) + 0.1 * np.eye(p.shape[1])
        return scaled(np.linalg.solve(r, delta / sd) / sd, delta)
    if method == "probe":
        x = np.concatenate([p, n])
        sd = x.std(0)
        z, y = torch.tensor((x - x.mean(0)) / sd), torch.tensor([1.0] * len(p) + [0.0] * len(n)).double()
        w, b = torch.zeros(z.shape[1], dtype=torch.double, requires_grad=True), torch.zeros((), dtype=torch.double, requires_grad=True)
        opt = torch.optim.LBFGS([w, b], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def loss():
            opt.zero_grad()
            f = torch.nn.functional.binary_cross_entropy_with_logits(z @ w + b, y, reduction="sum") + 0.5 * w @ w
            f.backward()
            return f

        opt.step(loss)
        return scaled(w.detach().numpy() / sd, delta)
    x = p - n
    if method == "pca_center":
        x = np.concatenate([x / 2, -x / 2])
    if method == "pca_diff":
        x = x - x.mean(0)
    u = np.linalg.svd(x, full_matrices=False)[2][0]
    side = np.sign((p - n) @ u)
    return scaled(u * (-1 if (side < 0).sum() > (side > 0).sum() else 1), delta, True)


PAIRS = [{"positive": {"prompt": a["prompt"], "completion": a["completion"]}, "negative": b["prompt"] if i == 1 else
          {"prompt": b["prompt"], "completion": b["completion"]}} for i, (a, b) in enumerate(zip(ROWS, OTHER))]


def row_means(keel, model, tmp, rows, *more):
    keel("capture", "-m", model, "--data", write_rows(tmp / "c.jsonl", rows), "--out", tmp / "c.safetensors", *more)
    return {int(k[5:]): v.astype(np.float64) for k, v in load_file(tmp / "c.safetensors").items() if k.startswith("rows.")}


def sizes(keel, model, tmp, rows, *more):
    """Mean |h| of the captured tokens of all rows, layer by layer, from the tokens themselves."""
    keel("capture", "-m", model, "--data", write_rows(tmp / "c.jsonl", rows), "--out", tmp / "c.safetensors", "--raw", tmp / "raw.safetensors", *more)
    return {int(k[7:]): np.abs(v.astype(np.float64)).mean(0) for k, v in load_file(tmp / "raw.safetensors").items() if k.startswith("hidden.")}


@pytest.mark.parametrize("method", ["mean", "mean_z", "mean_mask", "lda", "probe", "pca_diff", "pca_center", "svd"])
def test_directions(keel, tiny_c, tmp_path, method):
    out = tmp_path / "v.safetensors"
    sides = [[r["positive"] for r in PAIRS], [r["negative"] if isinstance(r["negative"], dict) else {"prompt": r["negative"]} for r in PAIRS]]
    p, n = (row_means(keel, tiny_c, tmp_path, s, "--positions", "last_prompt") for s in sides)
    h = sizes(keel, tiny_c, tmp_path, sides[0] + sides[1], "--positions", "last_prompt")
    r = keel("direction", "-m", tiny_c, "--pairs", write_rows(tmp_path / "p.jsonl", PAIRS), "--out", out, "--method", method, "--json",
             "--positions", "last_prompt").json
    got = load_file(out)
    assert sorted(got) == [f"direction.{i}" for i in range(3)] and r["method"] == method
    for i, gates in enumerate(r["layers"]):
        v, want = got[f"direction.{i}"], estimate(method, p[i], n[i], h[i])
        assert np.linalg.norm(v - want) < 2e-3 * np.linalg.norm(want), (i, method)
        massive = h[i] > 20 * np.median(h[i])
        assert gates["n_massive"] == massive.sum() and abs(gates["massive_share"] - (want[massive] ** 2).sum() / (want ** 2).sum()) < 1e-3
        assert -1 <= gates["split_half"] <= 1 and gates["random_95"] > 0 and 0 <= gates["auc"] <= 1


def test_captures_under_steering_and_noise(keel, tiny_a, tmp_path):
    """A capture sees what steering added, exactly; two halves of one set have no admissible direction between them."""
    width = 96
    v = 6 * vector(1, width) / np.sqrt(width)
    write_directions(tmp_path / "v.safetensors", {2: v}, keel_site="post")
    rows = ROWS + OTHER
    data = write_rows(tmp_path / "d.jsonl", rows)
    plain, steered = (row_means(keel, tiny_a, tmp_path, rows, "--layers", "2", *more)[2] for more in ((), ("--steer", f"{tmp_path}/v.safetensors")))
    assert np.abs(steered - plain - v).max() < 1e-4
    half = write_rows(tmp_path / "h.jsonl", rows[::2]), write_rows(tmp_path / "g.jsonl", rows[1::2])
    r = keel("direction", "-m", tiny_a, "--positive", half[0], "--negative", half[1], "--out", tmp_path / "n.gguf", "--layers", "2", "--method",
             "mean", "--json", "--benign", data).json["layers"][0]
    assert not r["admissible"] and abs(r["split_half"]) < 0.6 and r["benign_kl"] > 0


def test_shift_of_an_adapter(keel, tiny_a, oracle, tmp_path):
    ref = oracle(tiny_a)
    a = lora.random_adapter(ref.config, 3, 5, b_std=0.05)
    lora.write_gguf(tmp_path / "a.gguf", a, 6)
    r = keel("direction", "-m", tiny_a, "--data", write_rows(tmp_path / "d.jsonl", ROWS), "--shift", tmp_path / "a.gguf", "--out",
             tmp_path / "v.safetensors", "--method", "svd", "--rank", 3, "--json").json
    with_a = row_means(keel, tiny_a, tmp_path, ROWS, "--lora", tmp_path / "a.gguf")
    base = row_means(keel, tiny_a, tmp_path, ROWS)
    got = load_file(tmp_path / "v.safetensors")
    for i in range(7):
        u = got[f"direction.{i}"]
        assert u.shape == (3, 96) and np.abs(u @ u.T - np.eye(3)).max() < 1e-4
        want = np.linalg.svd(with_a[i] - base[i], full_matrices=False)[2][:3]
        assert np.linalg.svd(u @ want.T)[1].min() > 0.999
    assert len(r["layers"]) == 7


def test_layers_without_a_difference(keel, tiny_a, oracle, tmp_path):
    """What is the same below a trained layer has no direction there: a warning, and the others are made."""
    a = {k: v for k, v in lora.random_adapter(oracle(tiny_a).config, 3, 5, b_std=0.05).items() if k[0] >= 3}
    lora.write_gguf(tmp_path / "a.gguf", a, 6)
    data, out = write_rows(tmp_path / "d.jsonl", ROWS), tmp_path / "v.safetensors"
    shift = ["direction", "-m", tiny_a, "--data", data, "--shift", tmp_path / "a.gguf", "--out"]
    r = keel(*shift, out, "--json")
    assert "layers 0, 1, 2:" in r.err and r.err.count("no direction") == 1 and "warning: warning" not in r.err
    assert [g["layer"] for g in r.json["layers"]] == [3, 4, 5, 6] and sorted(load_file(out)) == [f"direction.{i}" for i in range(3, 7)]
    keel.fails(*shift, tmp_path / "none.safetensors", "--layers", "0-2", says=["same activations", "0, 1, 2", "--layers"])
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize("method", ["mean", "probe", "lda"])
def test_halves_without_a_difference(keel, tiny_a, tmp_path, method):
    """A split into halves of equal classes counts as a cosine of 0."""
    same = [{"prompt": "the sky is", "completion": " blue"}] * 3
    pos = write_rows(tmp_path / "p.jsonl", [*same, {"prompt": "a stone", "completion": " is red"}])
    out = tmp_path / "v.safetensors"
    for g in keel("direction", "-m", tiny_a, "--positive", pos, "--negative", write_rows(tmp_path / "n.jsonl", same + same[:1]), "--method", method,
                  "--out", out, "--json").json["layers"]:
        assert abs(g["split_half"]) < 1e-6 and not g["admissible"]


def test_paths_with_marks(keel, tiny_a, tmp_path):
    """A file that exists is taken by its whole path, whatever is in it."""
    data, folder = write_rows(tmp_path / "d.jsonl", ROWS), tmp_path / "x@y,lr=0.1:2"
    folder.mkdir()
    plain, odd = (write_directions(p, {2: vector(1, 96)}) for p in (tmp_path / "v.safetensors", folder / "v.safetensors"))
    for words in ("", ":0.5", ":0.5@2,at=response"):
        got = [score(keel, tiny_a, ROWS, tmp_path, "--steer", f"{p}{words}") for p in (plain, odd)]
        assert got[0] == got[1]
    keel.fails("score", "-m", tiny_a, "--data", data, "--out", tmp_path / "o.jsonl", "--steer", f"{odd}:1@3", says="no direction for layer 3")


def test_project(keel, tiny_a, tmp_path):
    v = {2: vector(1, 96), 4: vector(2, 96, 2)}
    write_directions(tmp_path / "v.safetensors", v)
    keel("project", "-m", tiny_a, "--direction", tmp_path / "v.safetensors", "--data", write_rows(tmp_path / "d.jsonl", ROWS), "--out",
         tmp_path / "o.jsonl")
    means = row_means(keel, tiny_a, tmp_path, ROWS)
    for i, row in enumerate(read_rows(tmp_path / "o.jsonl")):
        assert row["id"] == ROWS[i]["id"]
        assert abs(row["projection"]["2"] - means[2][i] @ v[2] / np.linalg.norm(v[2])) < 1e-3
        assert np.abs(np.array(row["projection"]["4"]) - v[4] / np.linalg.norm(v[4], axis=1)[:, None] @ means[4][i]).max() < 1e-3


# --- geometry ------------------------------------------------------------------------------------

def random_adapter(ref, path, seed, rank=3):
    a = lora.random_adapter(ref.config, rank, seed, b_std=0.05)
    lora.write_gguf(path, a, 6)
    return a


def test_geometry_of_an_adapter(keel, tiny_a, oracle, tmp_path):
    """Norms of ΔW without forming it, beside those of W, and the dimensions of the shift that it causes, against plain SVDs."""
    ref = oracle(tiny_a)
    a = random_adapter(ref, tmp_path / "a.gguf", 5)
    got = keel("geometry", "-m", tiny_a, "--adapter", f"{tmp_path}/a.gguf:0.5", "--json").json["adapters"][0]["layers"]
    assert len(got) == len(a) == 7 * 7
    module = {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj"}
    for g in got:
        pa, pb = a[g["layer"], g["module"]]
        s = np.linalg.svd(0.5 * 6 / 3 * pb.astype(np.float64) @ pa, compute_uv=False)
        assert g["rank"] == 3 and abs(g["frobenius"] / np.linalg.norm(s) - 1) < 1e-5 and abs(g["spectral"] / s[0] - 1) < 1e-5
        assert abs(g["stable_rank"] / ((s ** 2).sum() / s[0] ** 2) - 1) < 1e-5
        if g["module"] in module:
            w = ref.model.get_parameter(f"model.layers.{g['layer']}.{module[g['module']]}.weight").norm().item()
            assert abs(g["relative"] * w / g["frobenius"] - 1) < 1e-5
    rows = ROWS + OTHER
    base, after = (row_means(keel, tiny_a, tmp_path, rows, *more) for more in ((), ("--lora", tmp_path / "a.gguf")))
    got = keel("geometry", "-m", tiny_a, "--adapter", tmp_path / "a.gguf", "--data", write_rows(tmp_path / "d.jsonl", rows), "--json").json
    assert len(got["shifts"][0]["layers"]) == 7
    for g in got["shifts"][0]["layers"]:
        x = after[g["layer"]] - base[g["layer"]]
        lam = np.linalg.svd(x, compute_uv=False) ** 2
        assert abs(g["participation"] / (lam.sum() ** 2 / (lam ** 2).sum()) - 1) < 1e-3
        assert g["components"] == [int(np.searchsorted(np.cumsum(lam), q * lam.sum()) + 1) for q in (0.5, 0.8, 0.9, 0.95)]
        assert abs(g["mean_shift"] / np.linalg.norm(x.mean(0)) - 1) < 1e-3
        assert np.abs(np.array(g["scree"]) - (lam / lam.sum())[:len(g["scree"])]).max() < 1e-4


def test_massive_channels(keel, tiny_a, oracle, tmp_path):
    """A channel of the stream that steering makes enormous is listed."""
    v = np.zeros(96, np.float32)
    v[17] = 1e4
    rows = write_rows(tmp_path / "d.jsonl", ROWS)
    write_directions(tmp_path / "v.safetensors", {2: v})
    keel("capture", "-m", tiny_a, "--data", rows, "--out", tmp_path / "c.safetensors", "--steer", f"{tmp_path}/v.safetensors:1")
    size = load_file(tmp_path / "c.safetensors")["abs.2"]
    want = np.nonzero(size > 20 * np.median(size))[0].tolist()
    assert want == [17]
    got = keel("direction", "-m", tiny_a, "--positive", rows, "--negative", write_rows(tmp_path / "o.jsonl", OTHER), "--out",
               tmp_path / "w.safetensors", "--layers", "2", "--steer", f"{tmp_path}/v.safetensors:1", "--json").json["layers"][0]
    assert got["massive"] == want
    # Another sign at the prompt than at the response, as often: a row's mean no longer shows how large the channel is.
    alternating = ["--steer", f"{tmp_path}/v.safetensors:1,at=prompt", "--steer", f"{tmp_path}/v.safetensors:-1,at=response", "--positions", "all",
                   "--layers", "2"]
    tok, text = oracle(tiny_a).tok, "the clerk counts red stones and the sky is blue; what is the number"
    even = [{"prompt": text[:i], "completion": text[i:j]} for i in range(1, 20) for j in range(i + 1, len(text))
            if len(tok.encode(text[:i])) == len(tok.encode(text[i:j], bos=False))]
    even, odd = even[:3], even[-3:]
    size = sizes(keel, tiny_a, tmp_path, even + odd, *alternating)[2]
    assert np.nonzero(size > 20 * np.median(size))[0].tolist() == [17]
    p, n = (row_means(keel, tiny_a, tmp_path, rows, *alternating)[2] for rows in (even, odd))
    got = keel("direction", "-m", tiny_a, "--positive", write_rows(tmp_path / "p.jsonl", even), "--negative", write_rows(tmp_path / "n.jsonl", odd),
               "--out", tmp_path / "w.safetensors", "--json", *alternating).json["layers"][0]
    assert got["massive"] == [17] and got["massive_share"] == 0
    want = estimate("mean_mask", p, n, size)
    assert np.linalg.norm(load_file(tmp_path / "w.safetensors")["direction.2"] - want) < 2e-3 * np.linalg.norm(want)


def test_adapters_compared(keel, tiny_a, oracle, tmp_path):
    """Cosine of two ΔW and overlap of the spaces they read and write, against formed matrices; angles between their shifts."""
    ref = oracle(tiny_a)
    a, b = random_adapter(ref, tmp_path / "a.gguf", 5), random_adapter(ref, tmp_path / "b.gguf", 6, 4)
    rows = ROWS + OTHER
    r = keel("geometry", "-m", tiny_a, "--adapter", tmp_path / "a.gguf", "--adapter", tmp_path / "b.gguf", "--data",
             write_rows(tmp_path / "d.jsonl", rows), "--rank", 2, "--json").json
    q = lambda x: np.linalg.qr(x.astype(np.float64))[0]
    assert len(r["overlaps"]) == 1 and len(r["overlaps"][0]["layers"]) == 49
    for g in r["overlaps"][0]["layers"]:
        (xa, xb), (ya, yb) = a[g["layer"], g["module"]], b[g["layer"], g["module"]]
        dx, dy = (p.astype(np.float64) @ o for p, o in ((xb, xa), (yb, ya)))
        assert abs(g["cosine"] - (dx * dy).sum() / np.linalg.norm(dx) / np.linalg.norm(dy)) < 1e-6
        assert abs(g["in"] - (np.linalg.norm(q(xa.T).T @ q(ya.T)) ** 2) / 3) < 1e-6
        assert abs(g["out"] - (np.linalg.norm(q(xb).T @ q(yb)) ** 2) / 3) < 1e-6
        assert abs(g["random_in"] - 4 / xa.shape[1]) < 1e-9 and abs(g["random_out"] - 4 / xb.shape[0]) < 1e-9
    means = [row_means(keel, tiny_a, tmp_path, rows, *more) for more in ((), *(("--lora", tmp_path / f"{x}.gguf") for x in "ab"))]
    angles, = r["angles"]
    for g in angles["layers"]:
        u = [np.linalg.svd(m[g["layer"]] - means[0][g["layer"]], full_matrices=False)[2][:2] for m in means[1:]]
        assert np.abs(np.array(g["cosines"]) - np.linalg.svd(u[0] @ u[1].T, compute_uv=False)).max() < 1e-3


def test_adapters_of_lower_rank_compared(keel, tiny_a, oracle, tmp_path):
    """Spaces of ΔW, not of A and B, where B lacks rank; a negative scale turns the cosine's sign."""
    a = lora.random_adapter(oracle(tiny_a).config, 4, 5, b_std=0.05)
    b = lora.random_adapter(oracle(tiny_a).config, 3, 6, b_std=0.05)
    for _, up in a.values():
        up[:, 1] = 0
        up[:, 2] = 2 * up[:, 0]
    for name, x in (("a", a), ("b", b)):
        lora.write_gguf(tmp_path / f"{name}.gguf", x, 6)
    compare = lambda *scale: keel("geometry", "-m", tiny_a, "--adapter", f"{tmp_path}/a.gguf:{scale[0]}", "--adapter", f"{tmp_path}/b.gguf:{scale[1]}",
                                  "--json").json["overlaps"][0]["layers"]
    for g, turned in zip(compare(1, 2), compare(1, -0.5)):
        dx, dy = (up.astype(np.float64) @ down for down, up in (x[g["layer"], g["module"]] for x in (a, b)))
        (ux, _, vx), (uy, _, vy) = (np.linalg.svd(d, full_matrices=False) for d in (dx, dy))
        assert g["rank"] == [2, 3] and abs(g["cosine"] - (dx * dy).sum() / np.linalg.norm(dx) / np.linalg.norm(dy)) < 1e-6
        assert abs(g["in"] - np.linalg.norm(vx[:2] @ vy[:3].T) ** 2 / 2) < 1e-5 and abs(g["out"] - np.linalg.norm(ux[:, :2].T @ uy[:, :3]) ** 2 / 2) < 1e-5
        assert abs(g["random_in"] - 3 / dx.shape[1]) < 1e-9 and abs(g["random_out"] - 3 / dx.shape[0]) < 1e-9
        assert abs(turned["cosine"] + g["cosine"]) < 1e-9 and abs(turned["in"] - g["in"]) < 1e-9


def auc(x, y):
    return np.mean((x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None]))


def test_probes(keel, tiny_a, tmp_path):
    """Probes trained on one set and tested on another, against the direction of method `probe`; folds and chance by their bounds."""
    words = texts.ENGLISH.split()
    row = lambda i, text: {"id": str(i), "prompt": " ".join(words[i:i + 3]) + text}
    sets = {"a": [row(i, " one") for i in range(10)], "b": [row(i, " two") for i in range(10)], "c": [row(i + 20, " one") for i in range(8)],
            "d": [row(i + 20, " two") for i in range(8)]}
    f = {k: write_rows(tmp_path / f"set_{k}.jsonl", v) for k, v in sets.items()}
    means = {k: row_means(keel, tiny_a, tmp_path, v) for k, v in sets.items()}
    r = keel("geometry", "-m", tiny_a, "--positive", f["a"], "--negative", f["b"], "--positive", f["c"], "--negative", f["d"], "--out",
             tmp_path / "g", "--json").json["probes"]
    keel("direction", "-m", tiny_a, "--positive", f["a"], "--negative", f["b"], "--method", "probe", "--out", tmp_path / "v.safetensors")
    v = load_file(tmp_path / "v.safetensors")
    for g in r["layers"]:
        x, y = (means[k][g["layer"]] @ v[f"direction.{g['layer']}"] for k in "cd")
        assert abs(g["auc"][0][1] - auc(x, y)) < 0.02  # one of 64 pairs may lie at the border
        assert all(0 <= z <= 1 for z in np.ravel(g["auc"]))
    assert r["layers"][-1]["auc"][0][0] > 0.8  # the last token differs, which any probe sees
    assert 0.2 < np.mean([g["shuffled"] for g in r["layers"]]) < 0.8
    assert (tmp_path / "g" / "geometry.json").is_file() and (tmp_path / "g" / "geometry.html").is_file()
    keel.fails("geometry", "-m", tiny_a, "--positive", f["a"], "--negative", f["b"], "--positive", f["c"], says="belong together")
    few = write_rows(tmp_path / "few.jsonl", sets["a"][:2])
    keel.fails("geometry", "-m", tiny_a, "--positive", few, "--negative", few, says="at least")
    keel.fails("geometry", "-m", tiny_a, "--adapter", tmp_path / "none.gguf", "--probe", says="--data")


def test_geometry_plots(keel, tiny_a, oracle, tmp_path):
    """Every part of a result has its plot, and each of them data, scripts and, with gnuplot, a drawing."""
    ref = oracle(tiny_a)
    for i, name in enumerate("ab"):
        random_adapter(ref, tmp_path / f"{name}.gguf", 5 + i)
    keel("geometry", "-m", tiny_a, "--adapter", tmp_path / "a.gguf", "--adapter", tmp_path / "b.gguf", "--data",
         write_rows(tmp_path / "d.jsonl", ROWS + OTHER), "--probe", "--out", tmp_path / "g")
    plots = tmp_path / "g" / "plots"
    names = {"geometry_" + x for x in ("scree", "shift", "components", "angles", "delta", "probes")}
    assert {p.stem for p in plots.glob("*.csv")} == names
    for name in names:
        lines = (plots / f"{name}.csv").read_text().splitlines()
        assert len(lines) > 5 and all(len(x.split(",")) == len(lines[0].split(",")) for x in lines)
    if shutil.which("gnuplot"):
        assert (tmp_path / "g" / "geometry.html").read_text().count("<svg") == 2 * len(names)
    # report shows them where there is nothing else; another result leaves nothing of this one.
    keel("report", tmp_path / "g")
    assert (tmp_path / "g" / "report.html").read_text() == (tmp_path / "g" / "geometry.html").read_text()
    keel("geometry", "-m", tiny_a, "--adapter", tmp_path / "a.gguf", "--out", tmp_path / "g")
    assert {p.name.split(".")[0].split("-")[0] for p in plots.iterdir()} == {"geometry_delta"}
    keel("report", tmp_path / "g")
    assert "How many dimensions" not in (tmp_path / "g" / "report.html").read_text()
    (tmp_path / "g" / "geometry.json").write_text("{")
    keel.fails("report", tmp_path / "g", says=["geometry.json:1", "keel geometry --out"])


def test_principal_angles(keel, tmp_path):
    u, w = vector(1, 96, 4), vector(2, 96, 3)
    w[0] = u[0] + 0.1 * w[0]
    a = write_directions(tmp_path / "a.safetensors", {1: u, 2: vector(3, 96)})
    b = write_directions(tmp_path / "b.safetensors", {1: w, 3: vector(3, 96)})
    got, = keel("geometry", "--direction", a, "--other", b, "--json").json["angles"][0]["layers"]
    q = [np.linalg.qr(x.T.astype(np.float64))[0] for x in (u, w)]
    want = np.linalg.svd(q[0].T @ q[1], compute_uv=False)
    assert got["layer"] == 1 and np.abs(np.array(got["cosines"]) - want).max() < 1e-6
    assert abs(got["overlap"] - (want ** 2).mean()) < 1e-6 and abs(got["random"] - 4 / 96) < 1e-9
    c = write_directions(tmp_path / "c.safetensors", {1: vector(1, 64)})
    keel.fails("geometry", "--direction", a, "--other", c, says=["64", "96"])
    keel.fails("geometry", "--direction", a, says="--other")
    # Rows that depend on others, or are 0, add no dimension to a space; a direction of length 0 is none.
    e = np.concatenate([w, [w[0] - 2 * w[1], 0 * w[0]]]).astype(np.float32)
    e[1] *= 1e-3
    e[3] = e[0] - 2 * e[1]
    flat = write_directions(tmp_path / "e.safetensors", {1: e})
    got, = keel("geometry", "--direction", a, "--other", flat, "--json").json["angles"][0]["layers"]
    assert got["rank"] == [4, 3] and np.abs(np.array(got["cosines"]) - want).max() < 1e-5
    assert abs(got["overlap"] - (want ** 2).mean()) < 1e-5 and abs(got["random"] - 4 / 96) < 1e-9
    z = write_directions(tmp_path / "z.safetensors", {1: np.zeros(96, np.float32)})
    keel.fails("geometry", "--direction", a, "--other", z, says=["z.safetensors", "layer 1", "length 0"])


# --- control vectors -----------------------------------------------------------------------------

def make_control_vector(keel, model, tmp):
    keel("direction", "-m", model, "--pairs", write_rows(tmp / "p.jsonl", PAIRS), "--out", tmp / "v.gguf", "--method", "pca_center")
    return tmp / "v.gguf"


def test_control_vector_file(keel, tiny_a, tmp_path):
    r = gguf.GGUFReader(make_control_vector(keel, tiny_a, tmp_path))
    value = lambda k: r.get_field(k).contents()
    assert value("general.architecture") == "controlvector" and value("controlvector.layer_count") == 6
    assert [t.name for t in r.tensors] == [f"direction.{i}" for i in range(1, 7)]  # llama.cpp knows no direction.0
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and list(t.shape) == [96] for t in r.tensors)


def test_a_file_of_repeng(keel, tiny_a, oracle, tmp_path):
    ref = oracle(tiny_a)
    w = gguf.GGUFWriter(tmp_path / "r.gguf", "controlvector")
    w.add_string("controlvector.model_hint", "gemma3_text")
    w.add_uint32("controlvector.layer_count", 2)
    v = {1: vector(1, 96), 5: vector(2, 96)}
    for i, x in v.items():
        w.add_tensor(f"direction.{i}", x)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    got = score(keel, tiny_a, ROWS, tmp_path, "--steer", f"{tmp_path}/r.gguf:0.4")
    for row, g in zip(ROWS, got):
        assert np.abs(np.array(g["token_logprobs"]) - expected(ref, row, [("post", i, "add", x, 0.4, "all") for i, x in v.items()])).max() < TOL


@contextlib.contextmanager
def llama_cpp(model, vector, coef, width, layers):
    """next_logits(id) of llama.cpp on the CPU with `coef` times a control vector at `layers` (first, last)."""
    ll = pytest.importorskip("llama_cpp")
    tensors = {int(t.name.split(".")[1]): t.data for t in gguf.GGUFReader(vector).tensors}
    buf = np.zeros((max(tensors), width), np.float32)  # from layer 1 on, as llama.cpp lays it out
    for i, v in tensors.items():
        buf[i - 1] = coef * v
    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    params.n_gpu_layers = 0
    m = ll.llama_model_load_from_file(str(model).encode(), params)
    cp = ll.llama_context_default_params()
    cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_threads, cp.n_threads_batch = 512, 512, 512, 1, 1
    cp.type_k = cp.type_v = 0  # f32
    cp.flash_attn_type = 0
    ctx = ll.llama_init_from_model(m, cp)
    assert ll.llama_set_adapter_cvec(ctx, buf.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), buf.size, width, *layers) == 0
    n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(m))

    def next_logits(token):
        batch = (ll.llama_token * 1)(token)
        assert ll.llama_decode(ctx, ll.llama_batch_get_one(batch, 1)) == 0
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(ctx, -1), shape=(n_vocab,)).astype(np.float64)
    yield next_logits
    ll.llama_free(ctx)
    ll.llama_model_free(m)


def test_llama_cpp_steers_the_same(keel, tiny_a, oracle, tmp_path):
    path = make_control_vector(keel, tiny_a, tmp_path)
    row = {"id": "x", "prompt": texts.ENGLISH[:60], "completion": " the colour of the sky is blue"}
    g = score(keel, tiny_a, [row], tmp_path, "--steer", f"{path}:3")[0]
    plain = score(keel, tiny_a, [row], tmp_path)[0]
    ids, got = oracle(tiny_a).tok.encode(row["prompt"]) + g["token_ids"], []
    with llama_cpp(tiny_a, path, 3, 96, (1, 6)) as next_logits:
        for i, following in zip(ids, ids[1:]):
            z = next_logits(i)
            got.append(z[following] - z.max() - np.log(np.exp(z - z.max()).sum()))
    got = np.array(got[-len(g["token_ids"]):])
    assert np.abs(got - g["token_logprobs"]).max() < 1e-3
    assert np.abs(got - plain["token_logprobs"]).max() > 0.05


@pytest.mark.full
def test_style_of_the_real_model(keel, real, oracle, tmp_path):
    """A direction from sentences in capitals and in small letters makes the 270M write in capitals, in keel and in llama.cpp."""
    pairs = [{"positive": s.upper(), "negative": s} for s in texts.SENTENCES]
    keel("direction", "-m", real, "--pairs", write_rows(tmp_path / "p.jsonl", pairs), "--positions", "all", "--out", tmp_path / "v.gguf")
    prompt, tok = "The farmer went to the market because", oracle(real).tok
    share = lambda text: np.mean([c.isupper() for c in text if c.isalpha()])
    plain, steered = (generate(keel, real, prompt, 20, "--temp", 0, *more)[1]["text"] for more in ((), ("--steer", f"{tmp_path}/v.gguf:1@8")))
    print(plain, steered, sep="\n")
    assert share(plain) < 0.2 and share(steered) > 0.8
    ids = tok.encode(prompt)
    with llama_cpp(real, tmp_path / "v.gguf", 1, 640, (8, 8)) as next_logits:
        for i in ids[:-1]:
            next_logits(i)
        new = [ids[-1]]
        for _ in range(20):
            new.append(int(next_logits(new[-1]).argmax()))
    text = "".join(tok.tokens[i].replace("\u2581", " ") for i in new[1:])
    print(text)
    assert share(text) > 0.8


# --- bad input -----------------------------------------------------------------------------------

def test_bad_vectors(keel, tiny_a, tiny_c, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", ROWS)
    run = lambda steer, *says: keel.fails("score", "-m", tiny_a, "--data", data, "--out", tmp_path / "o.jsonl", "--steer", steer, says=says)
    good = write_directions(tmp_path / "v.safetensors", {2: vector(1, 96)})
    nan = vector(1, 96)
    nan[5] = np.nan
    run(write_directions(tmp_path / "w.safetensors", {2: vector(1, 64)}), "w.safetensors", "64", "96")
    run(write_directions(tmp_path / "n.safetensors", {2: nan}), "n.safetensors", "layer 2", "NaN")
    zero = write_directions(tmp_path / "z.safetensors", {2: np.zeros(96, np.float32)})
    for words in (":1,op=ablate", ":1", ":5%"):
        run(f"{zero}{words}", "z.safetensors", "layer 2", "length 0")
    run(write_directions(tmp_path / "site.safetensors", {2: vector(1, 96)}, keel_site="middle"), "site.safetensors", '"middle"', "mlp")
    run(write_directions(tmp_path / "l.safetensors", {7: vector(1, 96)}), "layer 7", "0 to 6")
    run(write_directions(tmp_path / "s.safetensors", {2: vector(1, 96, 2)}), "ablate")
    run(f"{good}:1@3", "no direction for layer 3")
    run(f"{good}:1@9", "no layer 9")
    run(f"{good}:8%", "plain coefficient")
    run(f"{good}:1x", "coefficient")
    run(f"{good}:0.5,op=ablate", "op=ablate", "0.5")
    run(f"{good}:1%,op=ablate", "op=ablate", "1%")
    keel("score", "-m", tiny_a, "--data", data, "--out", tmp_path / "o.jsonl", "--steer", f"{good}:1,op=ablate")
    (tmp_path / "o.jsonl").unlink()
    run(f"{good}:1,op=melt", "op=melt")
    run(f"{good}:1,at=never", "never")
    for schedule in ("linear", "linear:0", "melt:3", "first:2x"):
        run(f"{good}:1,tokens={schedule}", schedule, "ramp:N")
    run(tmp_path / "missing.gguf", "missing.gguf")
    run(tiny_a, "control vector")
    (tmp_path / "junk.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    run(tmp_path / "junk.safetensors", "direction.N")
    keel.fails("score", "-m", tiny_a, "--data", data, "--out", tmp_path / "o.jsonl", "--steer", f"{good}:1,op=cap", "--steer",
               f"{good}:2,op=floor", says="contradict")


def test_another_model_warns(keel, tiny_a, tmp_path):
    path = write_directions(tmp_path / "v.safetensors", {2: vector(1, 96)}, keel_model_hash="0123456789abcdef")
    r = keel("score", "-m", tiny_a, "--data", write_rows(tmp_path / "d.jsonl", ROWS), "--out", tmp_path / "o.jsonl", "--steer", path)
    assert "another model" in r.err


def test_bad_data(keel, tiny_a, tmp_path):
    rows, one = write_rows(tmp_path / "d.jsonl", ROWS), write_rows(tmp_path / "one.jsonl", ROWS[:1])
    out = tmp_path / "v.gguf"
    run = lambda *a, says: keel.fails("direction", "-m", tiny_a, "--out", out, *a, says=says)
    run("--positive", rows, "--negative", one, says="at least 2 rows of each class")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    run("--positive", rows, "--negative", tmp_path / "blank.jsonl", says=["blank.jsonl", "no rows"])
    run("--positive", rows, "--negative", rows, says="same activations")
    run("--positive", rows, "--negative", rows, "--method", "pca_diff", says="pairs")
    run("--positive", rows, says="one source")
    run("--pairs", rows, says=["d.jsonl:1", "positive"])
    run("--positive", rows, "--negative", rows, "--layers", "7", says="no layer 7")
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "the"}])
    run("--positive", prompts, "--negative", rows, "--positions", "response", says=["row 1", "positions"])
    run("--positive", prompts, "--negative", rows, "--site", "attn", says=["attn", ".safetensors"])
    keel.fails("capture", "-m", tiny_a, "--data", rows, "--out", tmp_path / "c.safetensors", "--positions", "response:", says="response:")
    keel.fails("capture", "-m", tiny_a, "--data", rows, "--out", tmp_path / "c.safetensors", "--f16", says="--raw", rc=2)
    # What no rows can mend is refused before they are read: here there are none.
    none = tmp_path / "none.jsonl"
    for options, says in ((["--rank", 2], "svd"), (["--method", "svd", "--rank", 2], "one direction a layer"), (["--site", "mlp"], "mlp"),
                          (["--layers", 0], "layer 0"), (["--method", "svd", "--rank", 2, "--benign", rows, "--out", tmp_path / "v.safetensors"], "--benign")):
        run("--pairs", none, *options, says=says)
    assert not out.exists()
