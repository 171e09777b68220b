# SPDX-License-Identifier: MIT
"""LoRA on the vision tower and the projector: training against peft on Gemma3ForConditionalGeneration, and adapters in use."""
import contextlib
import zlib

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lora
import tiny_vision
from gemma3_ref import LINEARS
from keelcli import read_log, score, train, train_args, write_rows
from test_images import PAIRS, ROWS, TRAIN, files, make_pair, run_score, with_folder  # noqa: F401 (make_pair is a fixture)

RANK, ALPHA = 3, 6
MODULE = {v: k for k, v in tiny_vision.BLOCK.items() if not v.startswith("ln")}  # "attn_q" -> "self_attn.q_proj"
PROJ = "mm.input_projection"


def vision_adapter(s, seed, projector=True):
    """{(name of the map in GGUF): (A, B)}"""
    k_of = lambda m: s.ff if m == "ffn_down" else s.hidden
    n_of = lambda m: s.ff if m == "ffn_up" else s.hidden
    shapes = {f"v.blk.{i}.{m}": (k_of(m), n_of(m)) for i in range(s.layers) for m in MODULE}
    if projector:
        shapes[PROJ] = (s.hidden, s.out)
    out = {}
    for name, (k, n) in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        out[name] = ((rng.uniform(-1, 1, (RANK, k)) * k ** -0.5).astype(np.float32),
                     (0.05 * rng.standard_normal((n, RANK))).astype(np.float32))
    return out


def text_adapter(config, seed):
    return {f"blk.{layer}.{t}": ab for (layer, t), ab in lora.random_adapter(config, RANK, seed, b_std=0.05).items()}


def write_gguf(path, adapter):
    w = gguf.GGUFWriter(str(path), "gemma3")
    w.add_string("general.type", "adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in adapter.items():
        w.add_tensor(f"{name}.weight.lora_a", a)
        w.add_tensor(f"{name}.weight.lora_b", b)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def read_gguf(path):
    got = {t.name: np.array(t.data, np.float32) for t in gguf.GGUFReader(str(path)).tensors}
    names = sorted({n.rsplit(".weight.", 1)[0] for n in got})
    assert len(got) == 2 * len(names)
    return {n: (got[f"{n}.weight.lora_a"], got[f"{n}.weight.lora_b"]) for n in names}


def hf_module(name):
    """"v.blk.1.attn_q" -> "model.vision_tower.encoder.layers.1.self_attn.q_proj"; blocks of the language model likewise."""
    *_, layer, target = name.split(".")
    if name.startswith("v."):
        return f"model.vision_tower.encoder.layers.{layer}.{MODULE[target]}"
    return f"model.language_model.layers.{layer}.{LINEARS[target]}"


@contextlib.contextmanager
def attached(vlm, adapter):
    """vlm.model with the adapter (trainable) as peft puts it on; the projector's, which is no module, by hand. Yields {name: (A, B)}."""
    blocks = [n for n in adapter if n != PROJ]
    proj, plain = vlm.model.model.multi_modal_projector, None
    model = get_peft_model(vlm.model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none",
                                                 target_modules=[hf_module(n) for n in blocks]))
    try:
        named = dict(model.named_parameters())
        params = {n: tuple(named[f"base_model.model.{hf_module(n)}.lora_{h}.default.weight"] for h in "AB") for n in blocks}
        if PROJ in adapter:
            plain = proj.forward
            params[PROJ] = tuple(torch.nn.Parameter(torch.zeros(x.shape)) for x in adapter[PROJ])
            weight = proj.mm_input_projection_weight

            def forward(x):
                del proj._parameters["mm_input_projection_weight"]
                a, b = params[PROJ]
                proj.mm_input_projection_weight = weight + ALPHA / RANK * (b @ a).T
                try:
                    return plain(x)
                finally:
                    del proj.mm_input_projection_weight
                    proj.register_parameter("mm_input_projection_weight", weight)
            proj.forward = forward
        with torch.no_grad():
            for n, ab in params.items():
                for p, x in zip(ab, adapter[n], strict=True):
                    p.copy_(torch.from_numpy(x))
        yield params
    finally:
        if plain:
            proj.forward = plain
        model.unload()
        vlm.model.requires_grad_(False)


def oracle_grads(vlm, adapter, rows):
    with attached(vlm, adapter) as params:
        loss = vlm.step_loss(None, rows)
        return loss, {n: tuple(p.grad.numpy().copy() for p in ab) for n, ab in params.items()}


def check_grads(init, got, want, rel):
    """As test_train.py: one AdamW step with eps = lr = 1 moves a weight by u = g / (|g| + 1)."""
    assert got.keys() == init.keys()
    for name in want:
        for h, half in enumerate("ab"):
            u = init[name][h].astype(np.float64) - got[name][h]
            g = u / (1 - np.abs(u))
            err = np.linalg.norm(g - want[name][h])
            assert err < rel * np.linalg.norm(want[name][h]) + 3e-8 * g.size ** 0.5, (name, half, err, np.linalg.norm(want[name][h]))


# Through the language model, projector and tower: summation order over up to nine blocks, forwards and backwards.
@pytest.mark.parametrize("name,what", [("tiny_a", "both"), ("tiny_c", "both"), ("tiny_a", "tower")])
def test_gradients_per_tensor(keel, make_pair, name, what):  # noqa: F811
    model, mmproj, vlm, folder = make_pair(name)
    rows = TRAIN["mixed" if what == "both" else "image"]  # the oracle has no gradient for a text row where only the tower learns
    init = vision_adapter(vlm.shape, 5)
    targets = "vision.*"
    if what == "both":
        init, targets = {**text_adapter(vlm.ref.config, 3), **init}, "all,vision.*"
    write_gguf(folder / "init.gguf", init)
    out, log = train(keel, model, rows, folder, mmproj=mmproj, init_adapter=folder / "init.gguf", rank=RANK, alpha=ALPHA, lr=1, eps=1,
                     batch=2, accum=len(rows) // 2, steps=1, targets=targets)
    loss, want = oracle_grads(vlm, init, [with_folder(r, folder) for r in rows])
    assert abs(log[0]["loss"] / loss - 1) < 1e-3
    check_grads(init, read_gguf(out), want, 3e-3)


def test_losses(keel, make_pair):  # noqa: F811
    """Several steps: soft tokens follow the adapter. Within 1 % of peft; measured 1e-4."""
    model, mmproj, vlm, folder = make_pair("tiny_a")
    rows = TRAIN["image"]
    init = {**text_adapter(vlm.ref.config, 3), **vision_adapter(vlm.shape, 5)}
    write_gguf(folder / "init.gguf", init)
    _, log = train(keel, model, rows, folder, mmproj=mmproj, init_adapter=folder / "init.gguf", rank=RANK, alpha=ALPHA, lr=5e-3,
                   batch=2, steps=6, targets="all,vision.*", no_shuffle=True)
    with attached(vlm, init) as params:
        opt = torch.optim.AdamW([p for ab in params.values() for p in ab], lr=5e-3, weight_decay=0.0)
        for step, r in enumerate(log):
            opt.zero_grad()
            loss = vlm.step_loss(None, [with_folder(x, folder) for x in (rows * 4)[2 * step:2 * step + 2]])
            opt.step()
            print(r["loss"] / loss - 1)
            assert abs(r["loss"] / loss - 1) < 2e-3
    assert log[-1]["loss"] < log[0]["loss"]


def test_adapters_in_use(keel, make_pair, tmp_path):  # noqa: F811
    """score --lora with pairs of both; from GGUF and from a PEFT folder that keel wrote, which peft loads as well."""
    pair = make_pair("tiny_a")
    model, mmproj, vlm, folder = pair
    adapter = {**text_adapter(vlm.ref.config, 3), **vision_adapter(vlm.shape, 5)}
    write_gguf(tmp_path / "a.gguf", adapter)
    base, got = run_score(keel, pair, ROWS), run_score(keel, pair, ROWS, "--lora", tmp_path / "a.gguf")
    again = run_score(keel, pair, ROWS, "--lora", tmp_path / "a.gguf")
    assert [r["logprob"] for r in again] == [r["logprob"] for r in got], "the second time from the cache"
    with attached(vlm, adapter):
        check_rows(pair, got)
    moved = [abs(a["logprob"] - b["logprob"]) for a, b in zip(base, got)]
    assert min(moved) > 1e-4
    # Without images the tower does not matter, and neither does it need to be there.
    text = [r for r in ROWS if r["id"] == "text"]
    plain = score(keel, model, text, tmp_path, "--lora", tmp_path / "a.gguf")
    assert abs(plain[0]["logprob"] - next(r for r in got if r["id"] == "text")["logprob"]) < 1e-3


def check_rows(pair, got, tol=2e-3):
    _, _, vlm, folder = pair
    for row, g in zip(ROWS, got, strict=True):
        prompt, _, names = vlm.row(row, open_=True)
        c = vlm.tok.encode(row["completion"], bos=False)
        want = vlm.logprobs(prompt + c, files(folder, names))[len(prompt) - 1:]
        assert np.abs(np.array(g["token_logprobs"]) - want).max() < tol, row["id"]


def test_peft_folder(keel, make_pair, tmp_path):  # noqa: F811
    """A folder that keel wrote gives the same log-probabilities in peft and, read back, in keel."""
    pair = make_pair("tiny_a")
    model, mmproj, vlm, folder = pair
    data = write_rows(folder / "peft.jsonl", TRAIN["image"])
    maps = ",".join(f"vision.{m}" for m in MODULE)
    keel(*train_args(model, data, tmp_path / "peft", mmproj=mmproj, rank=RANK, batch=2, steps=3, lr=1e-2, targets=f"attn_q,ffn_up,{maps}"))
    got = run_score(keel, pair, ROWS, "--lora", tmp_path / "peft")
    peft = PeftModel.from_pretrained(vlm.model, tmp_path / "peft")
    try:
        check_rows(pair, got)
    finally:
        peft.unload()
    keel.fails(*train_args(model, data, tmp_path / "never", mmproj=mmproj, rank=RANK, batch=2, steps=1, targets="vision.*"), says="vision.proj")


def test_resume(keel, make_pair):  # noqa: F811
    model, mmproj, _, folder = make_pair("tiny_a")
    data = write_rows(folder / "r.jsonl", TRAIN["image"])
    run = lambda out, **o: keel(*train_args(model, data, folder / out, mmproj=mmproj, rank=2, batch=2, targets="attn_v,vision.*",
                                            log=folder / (out + ".log"), **o))
    run("vx.gguf", steps=3)
    run("vz.gguf", steps=1, resume=folder / "vz.state")
    run("vz.gguf", steps=3, resume=folder / "vz.state")
    assert (folder / "vz.gguf").read_bytes() == (folder / "vx.gguf").read_bytes()
    assert [r["loss"] for r in read_log(folder / "vz.gguf.log")] == [r["loss"] for r in read_log(folder / "vx.gguf.log")]


def test_bad_use(keel, make_pair, tmp_path):  # noqa: F811
    model, mmproj, vlm, folder = make_pair("tiny_a")
    data = write_rows(folder / "in.jsonl", [ROWS[0]])
    never = tmp_path / "never.gguf"
    fails = lambda *says, **o: keel.fails(*train_args(model, data, never, **o), says=list(says))
    fails("--mmproj", targets="vision.*")
    fails("\"vision.attn\" is no projection", mmproj=mmproj, targets="vision.attn")
    fails("--layers", mmproj=mmproj, targets="vision.*", layers="1")
    text = write_rows(folder / "text.jsonl", [{"prompt": "the sky", "completion": " is blue"}])
    keel.fails(*train_args(model, text, never, mmproj=mmproj, targets="vision.*"), says="no row of --data has an image")
    r = keel(*train_args(model, text, tmp_path / "both.gguf", mmproj=mmproj, targets="attn_v,vision.*", steps=1))
    assert r.err.count("learns nothing") == 1
    # The alignment rows have images.
    keel(*train_args(model, text, tmp_path / "lisa.gguf", mmproj=mmproj, targets="vision.*", steps=1, lisa_data=data))
    write_gguf(tmp_path / "v.gguf", vision_adapter(vlm.shape, 5))
    fails("vision tower too", init_adapter=tmp_path / "v.gguf", rank=RANK, mmproj=mmproj, targets="all")
    keel.fails("export", "-m", model, "--adapter", tmp_path / "v.gguf", "--out", tmp_path / "peft", says="vision tower")
    other = vision_adapter(tiny_vision.SHAPES[PAIRS["tiny_c"]], 5)
    write_gguf(tmp_path / "other.gguf", other)
    keel.fails("run", "-m", model, "--mmproj", mmproj, "--image", folder / "p0.png", "-p", "a", "-n", 1, "--lora", tmp_path / "other.gguf",
               says="belongs to another model")
