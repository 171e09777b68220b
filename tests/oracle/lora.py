# SPDX-License-Identifier: MIT
"""lora: LoRA adapters in numpy, their two file formats, and training by peft and torch.optim.AdamW as the oracle.

An adapter is {(layer, target): (A [rank, in], B [out, rank])} with llama.cpp's target names.
Does not own models (gemma3_ref) or expected values (make_fixtures).
"""
import contextlib
import json
import zlib
from pathlib import Path

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from gemma3_ref import HF_OF, LINEARS, TARGETS

PEFT_PREFIX = "base_model.model."


def dims(config, target):
    """(out, in) of a projection."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    h, f = config.hidden_size, config.intermediate_size
    return {"attn_q": (q, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, q), "ffn_gate": (f, h),
            "ffn_up": (f, h), "ffn_down": (h, f)}[target]


def random_adapter(config, rank, seed, targets=TARGETS, b_std=0.0):
    """A Kaiming-uniform (bound 1 / sqrt(in)) as peft draws it, B normal of b_std; a stream of its own for each tensor."""
    out = {}
    for layer in range(config.num_hidden_layers):
        for t in targets:
            rng = np.random.default_rng([seed, layer, zlib.crc32(t.encode())])
            n_out, n_in = dims(config, t)
            a = rng.uniform(-1, 1, (rank, n_in)) * n_in ** -0.5
            out[layer, t] = (a.astype(np.float32), (b_std * rng.standard_normal((n_out, rank))).astype(np.float32))
    return out


def write_gguf(path, adapter, alpha, arch="gemma3"):
    w = gguf.GGUFWriter(str(path), arch)
    w.add_string("general.type", "adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", alpha)
    for (layer, t), (a, b) in adapter.items():
        w.add_tensor(f"blk.{layer}.{t}.weight.lora_a", a)
        w.add_tensor(f"blk.{layer}.{t}.weight.lora_b", b)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def read_gguf(path):
    """(adapter, alpha); every tensor must be half of a pair and named as llama.cpp names it."""
    r = gguf.GGUFReader(str(path))
    halves = {}
    for t in r.tensors:
        blk, layer, target, weight, half = t.name.split(".")
        assert blk == "blk" and weight == "weight" and half in ("lora_a", "lora_b") and target in TARGETS, t.name
        halves[int(layer), target, half] = np.array(t.data, np.float32)
    assert r.fields["general.type"].contents() == "adapter" and r.fields["adapter.type"].contents() == "lora"
    assert r.fields["general.architecture"].contents() == "gemma3"
    keys = sorted({k[:2] for k in halves})
    assert len(halves) == 2 * len(keys)
    return ({k: (halves[(*k, "lora_a")], halves[(*k, "lora_b")]) for k in keys},
            r.fields["adapter.lora.alpha"].contents())


def peft_name(layer, target, half):
    return f"{PEFT_PREFIX}model.layers.{layer}.{LINEARS[target]}.lora_{half}.weight"


def write_peft(folder, adapter, alpha, base="tiny"):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sd = {}
    for (layer, t), (a, b) in adapter.items():
        sd[peft_name(layer, t, "A")], sd[peft_name(layer, t, "B")] = a, b
    save_file(sd, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(adapter.values()))[0].shape[0]
    cfg = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
           "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
           "target_modules": sorted({HF_OF[t] for _, t in adapter})}
    (folder / "adapter_config.json").write_text(json.dumps(cfg, indent=1))


def read_peft(folder):
    sd = load_file(Path(folder) / "adapter_model.safetensors")
    cfg = json.loads((Path(folder) / "adapter_config.json").read_text())
    back = {v: k for k, v in LINEARS.items()}
    out = {}
    for name, a in sd.items():
        if name.endswith(".lora_A.weight"):
            parts = name[len(PEFT_PREFIX):].split(".")
            b = sd[name.replace(".lora_A.", ".lora_B.")]
            out[int(parts[2]), back[".".join(parts[3:5])]] = (a.astype(np.float32), b.astype(np.float32))
    assert len(sd) == 2 * len(out)
    return out, cfg["lora_alpha"]


@contextlib.contextmanager
def attached(ref, adapter, alpha):
    """ref.model as a peft model with this adapter (trainable); taken off again at the end."""
    rank = next(iter(adapter.values()))[0].shape[0]
    cfg = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted({HF_OF[t] for _, t in adapter}), lora_dropout=0.0,
                     bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(ref.model, cfg)
    try:
        for k, (pa, pb) in lora_params(model, adapter).items():
            with torch.no_grad():
                pa.copy_(torch.from_numpy(adapter[k][0]))
                pb.copy_(torch.from_numpy(adapter[k][1]))
        yield model
    finally:
        model.unload()
        ref.model.requires_grad_(False)


def lora_params(model, keys):
    """{(layer, target): (A, B) torch parameters}."""
    named = dict(model.named_parameters())
    get = lambda k, h: named[peft_name(*k, h).replace(".weight", ".default.weight")]
    return {k: (get(k, "A"), get(k, "B")) for k in sorted(keys)}


def chat_ids(tok, messages):
    """(ids, mask) of Gemma's template; the mask marks assistant contents and the end of turn after them."""
    start, end, nl = tok.id["<start_of_turn>"], tok.id["<end_of_turn>"], tok.encode("\n", bos=False)
    ids, mask, prefix = [tok.bos], [0], ""
    for m in messages:
        if m["role"] == "system":
            prefix = m["content"].strip() + "\n\n"
            continue
        bot = m["role"] in ("assistant", "model")
        head = [start] + tok.encode("model\n" if bot else "user\n" + prefix, bos=False)
        if bot:
            body = tok.encode(m["content"].strip(), bos=False)
        else:  # one text: "user\n", the system part and the content may share a run of newlines
            head, body = [start], tok.encode("user\n" + prefix + m["content"].strip(), bos=False)
            prefix = ""
        ids += head + body + [end] + nl
        mask += [0] * len(head) + [int(bot)] * (len(body) + 1) + [0] * len(nl)
    return ids, mask


def row_ids(tok, row):
    """(ids, mask) of a data row: mask is 1 where the token is learnt."""
    if "messages" in row:
        return chat_ids(tok, row["messages"])
    p, c = tok.encode(row["prompt"]), tok.encode(row["completion"], bos=False)
    if row.get("eos"):
        c = c + [tok.eot if tok.eot is not None else tok.eos]
    return p + c, [0] * len(p) + [1] * len(c)


def step_loss(model, batch):
    """Mean negative log-likelihood over the loss tokens of all rows of the step; adds to .grad row by row."""
    n, total = sum(sum(m[1:]) for _, m in batch), 0.0
    for ids, mask in batch:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        keep = torch.tensor(mask[1:]).bool()
        loss = torch.nn.functional.cross_entropy(logits[keep], torch.tensor(ids[1:])[keep], reduction="sum") / n
        loss.backward()
        total += loss.item()
    return total


def train(ref, adapter, alpha, steps, lrs, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=0.0, loss_of=None):
    """Trains `adapter` with one optimiser step for each list of rows in `steps` and each rate in `lrs`. loss_of(model, rows): the loss
    of a step's rows, adding to .grad; without it that of text rows.
    Returns {"loss", "grad_norm" per step, "grads": step 1's {(layer, target): (gA, gB)}, "adapter": the result}."""
    out = {"loss": [], "grad_norm": [], "grads": None}
    loss_of = loss_of or (lambda model, rows: step_loss(model, [row_ids(ref.tok, r) for r in rows]))
    with attached(ref, adapter, alpha) as model:
        params = lora_params(model, adapter)
        flat = [p for ab in params.values() for p in ab]
        opt = torch.optim.AdamW(flat, lr=1.0, betas=betas, eps=eps, weight_decay=weight_decay)
        for rows, lr in zip(steps, lrs, strict=True):
            opt.zero_grad()
            out["loss"].append(loss_of(model, rows))
            if out["grads"] is None:
                out["grads"] = {k: (a.grad.numpy().copy(), b.grad.numpy().copy()) for k, (a, b) in params.items()}
            norm = float(torch.sqrt(sum(p.grad.double().pow(2).sum() for p in flat)))
            out["grad_norm"].append(norm)
            if clip and norm > clip:
                for p in flat:
                    p.grad.mul_(clip / norm)
            opt.param_groups[0]["lr"] = lr
            opt.step()
        out["adapter"] = {k: (a.detach().numpy().copy(), b.detach().numpy().copy()) for k, (a, b) in params.items()}
    return out


def logprobs(ref, adapter, alpha, ids):
    with attached(ref, adapter, alpha) as model:
        return ref.logprobs(ids, model)
