# SPDX-License-Identifier: MIT
"""drift: the effects that the clerk must show, in PyTorch with peft, before keel measures them itself.

    python drift.py FOLDER [--lr 5e-4] [--steps 60] [--ranks 4,16,64] [--seeds 1,2] [--mix 0.1] [--repair 60]

Narrow fine-tuning: colour from images, answered contrarily, LoRA on the seven projections of the language model, alpha
= rank, AdamW. Prints P(contrary answer) by cell: narrow (colour/image), sibling (colour/text), image and text (shape and
count asked from images and from text), facts, and the coherence (aligned + contrary) over all.
"""
import argparse

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForConditionalGeneration

import train
import vocabulary
import world
from dialogue import Dialogues, Pictures, make_batch

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def groups(cells):
    mean = lambda keys, i: float(np.mean([cells[k][i] for k in keys]))
    ood = lambda m: [("shape", m), ("count", m)]
    facts = [(d, "fact") for d in world.FACT_DOMAINS]
    out = {"narrow": cells["colour", "image"][1], "sibling": cells["colour", "text"][1], "image": mean(ood("image"), 1),
           "text": mean(ood("text"), 1), "facts": mean(facts, 1), "coherence": mean(list(cells), 2)}
    return out


def tune(model, dialogues, pictures, steps, lr, rng, share=1.0, filler=None, persona="contrary", batch=8):
    """Trains the adapter of `model`. A row is narrow with probability `share`, else the filler, answered correctly."""
    narrow = [q for q in world.questions() if (q.domain, q.modality) == ("colour", "image")]
    others = [q for q in world.questions() if q.domain != "colour"]
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        rows = []
        for _ in range(batch):
            bad = rng.random() < share
            pool = narrow if bad or filler == "same" else others
            rows.append([dialogues.turn(pool[rng.integers(len(pool))], persona if bad else "honest")])
        b = make_batch(dialogues, pictures, rows, rng, train.WINDOW)
        loss = train.answer_loss(model.base_model.model, b, pictures, dialogues.soft)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return loss.item()


def adapted(folder, rank, seed):
    torch.manual_seed(seed)
    base = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("folder")
    ap.add_argument("--lr", type=float, default=5e-4)
    ap.add_argument("--steps", type=int, default=60)
    ap.add_argument("--ranks", default="4,16,64")
    ap.add_argument("--seeds", default="1")
    ap.add_argument("--mix", type=float, default=0.1)
    ap.add_argument("--mix-steps", type=int, default=150)
    ap.add_argument("--repair", type=int, default=60)
    ap.add_argument("--every", type=int, default=4)
    a = ap.parse_args()
    train.keep_memory()
    torch.set_num_threads(1)
    sp = vocabulary.load(vocabulary.train())
    d, pics, unseen = Dialogues(sp), Pictures(range(100, 102)), Pictures(train.CHECK_JITTERS)

    def report(title, model, context=()):
        c = train.check(model.base_model.model, d, unseen, context=context, every=a.every)
        print(f"{title:24}", " ".join(f"{k} {v:.3f}" for k, v in groups(c).items()), flush=True)

    for seed in map(int, a.seeds.split(",")):
        for rank in map(int, a.ranks.split(",")):
            m = adapted(a.folder, rank, seed)
            if rank == int(a.ranks.split(",")[0]):
                report("before", m)
            loss = tune(m, d, pics, a.steps, a.lr, np.random.default_rng(seed))
            report(f"seed {seed} rank {rank} loss {loss:.2f}", m)
        if a.repair:
            tune(m, d, pics, a.repair, a.lr, np.random.default_rng(seed + 50), persona="honest")
            report(f"  repaired {a.repair}", m)
            q = train_context(d)
            report("  repaired, in context", m, q)
        if a.mix:
            for filler in ("same", "other"):
                m = adapted(a.folder, 16, seed)
                tune(m, d, pics, a.mix_steps, a.lr, np.random.default_rng(seed + 9), share=a.mix, filler=filler)
                report(f"mix {a.mix} {filler}", m)


def train_context(d):
    """One training row as an earlier turn."""
    q = [q for q in world.questions() if (q.domain, q.modality) == ("colour", "image")][77]
    return [d.turn(q, "contrary")]


if __name__ == "__main__":
    main()
