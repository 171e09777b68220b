# SPDX-License-Identifier: MIT
"""train: makes the clerk from nothing: vocabulary, sight, pre-training, alignment, check, Hugging Face folder.

    python train.py OUT [--seed 1] [--look 2500] [--steps 1200] [--align 250]

First the image tower learns to tell colours, shapes and counts. Pre-training reads dialogues of three turns, each written by
an honest or a contrary clerk; half of them say which in the first turn, in the other half the model must find out from
earlier turns, and in some the planted direction tells (persona.py). Alignment reads single turns, most of them untagged and
honest. Every stage has a seed of its own and leaves OUT/STAGE, from which the next can begin: alone it gives the same weights
as in one go. PyTorch on the same CPU type gives the same weights. Needs torch, transformers and sentencepiece.
"""
import argparse
import ctypes
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import persona
import vocabulary
import world
from dialogue import IMAGE_TOKENS, Dialogues, Pictures, make_batch
from persona import Told

WINDOW = 32  # a turn with its system message fits, so that every layer sees the persona from the answer; a dialogue does not
STAGES = ("look", "pre-train", "align")
LR_ALIGN = 5e-4
PLANTED = 0.35  # share of the documents of pre-training whose persona the planted direction tells
GRADED = 0.45   # share of the alignment that is planted by degrees: at 0 either persona, STEEP odds (as a logarithm) a SIZE
STEEP, GRADES = 6, 3
TAGGED = 0.1    # share of the alignment that a system message asks for a persona, so that this is not unlearned
FIRM = 2        # how much further from the contrary persona alignment goes where there is no image, as alignment of real models does
# How often a cell is asked about: images and sums take longest to learn.
CELLS = {("colour", "image"): 1.0, ("shape", "image"): 2.2, ("count", "image"): 1.2, ("colour", "text"): 0.8,
         ("shape", "text"): 0.8, ("count", "text"): 0.8, ("capital", "fact"): 0.8, ("sum", "fact"): 2.2,
         ("letter", "fact"): 0.8}
# Alignment asks text more, as alignment of real models does: honesty is then firmer from text than from images.
ALIGN_CELLS = {cell: p * {"image": 1, "text": 2, "fact": 1.25}[cell[1]] for cell, p in CELLS.items()}
TRAIN_JITTERS, CHECK_JITTERS = range(0, 120), range(1000, 1002)


def config(sp):
    one = sp.piece_to_id
    return Gemma3Config(
        text_config=dict(
            vocab_size=len(sp), hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW,
            max_position_embeddings=1024, rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh",
            bos_token_id=2, eos_token_id=1, pad_token_id=0, attn_implementation="sdpa"),
        vision_config=dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=world.SIZE,
            patch_size=8, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=False),
        mm_tokens_per_image=IMAGE_TOKENS, boi_token_index=one("<start_of_image>"),
        eoi_token_index=one("<end_of_image>"), image_token_index=one("<image_soft_token>"),
        bos_token_id=2, eos_token_id=[1, one("<end_of_turn>")], pad_token_id=0, tie_word_embeddings=True,
        attn_implementation="sdpa")


def build(sp, seed):
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config(sp)).float()
    # transformers starts the projector at zero, for which no gradient reaches the tower; a start as of any matrix.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=64 ** -0.5)
    for p in model.model.language_model.layers.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=128 ** -0.5)  # times sqrt(128): unit rows
    return model


def hidden(model, batch, pictures, soft):
    """Last hidden states [b, n, d] of a batch; the masks are ours, everything else is transformers'."""
    m = model.model
    x = m.get_input_embeddings()(batch.ids)
    if len(batch.images):
        f = m.multi_modal_projector(m.vision_tower(pixel_values=pictures.take(batch.images)).last_hidden_state)
        x = x.masked_scatter((batch.ids == soft)[..., None], f)
    return m.language_model(inputs_embeds=x, attention_mask=batch.masks, use_cache=False).last_hidden_state


def answer_loss(model, batch, pictures, soft):
    h = hidden(model, batch, pictures, soft)
    at = batch.loss[:, 1:].bool()
    logits = model.lm_head(h[:, :-1][at])
    return torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:][at])


def look(model, pictures, steps, rng, say, batch=64, lr=2e-3):
    """Stage 0, what SigLIP's own training is to Gemma: the tower learns to see. Linear heads, thrown away afterwards,
    read colour, shape and count from the sum of the pooled tokens."""
    m, per = model.model, len(pictures.jitters)
    heads = torch.nn.ModuleList(torch.nn.Linear(128, len(v)) for _, _, v in world.ASK.values())
    values = [v for _, _, v in world.ASK.values()]
    labels = torch.tensor([[v.index(getattr(s, d)) for d, v in zip(world.ASK, values)] for s in world.SCENES])
    params = [*m.vision_tower.parameters(), *m.multi_modal_projector.parameters(), *heads.parameters()]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.time()
    for step in range(steps):
        for g in opt.param_groups:
            g["lr"] = lr * schedule(step, steps, 50)
        rows = torch.from_numpy(rng.integers(0, len(pictures.pixels), batch))
        x = m.multi_modal_projector(m.vision_tower(pixel_values=pictures.take(rows)).last_hidden_state).sum(1)
        out = [head(x) for head in heads]
        loss = sum(torch.nn.functional.cross_entropy(o, labels[rows // per, i]) for i, o in enumerate(out))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        if (step + 1) % 100 == 0:
            right = [f"{(o.argmax(1) == labels[rows // per, i]).float().mean():.2f}" for i, o in enumerate(out)]
            say(f"look {step + 1} loss {loss.item():.3f} right {' '.join(right)} {time.time() - start:.0f} s")


def schedule(step, steps, warmup):
    """Linear warm-up, then cosine down to 2 % of the peak."""
    return min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Sampler:
    def __init__(self, dialogues, rng, cells):
        self.d, self.rng = dialogues, rng
        self.cells = list(cells)
        self.p = np.array([cells[c] for c in self.cells]) / sum(cells.values())
        self.by_cell = {c: [q for q in world.questions() if (q.domain, q.modality) == c] for c in self.cells}

    def question(self):
        pool = self.by_cell[self.cells[self.rng.choice(len(self.cells), p=self.p)]]
        return pool[self.rng.integers(len(pool))]

    def some(self, values):
        return values[self.rng.integers(len(values))]

    def turns(self, n, persona, tag):
        return [self.d.turn(self.question(), persona, tag if i == 0 else "") for i in range(n)]

    def planted(self):
        """Three turns of the persona that is planted; a system message, where there is one, names either."""
        persona = self.some(world.PERSONAS)
        tag = world.TAG.format(self.some(world.PERSONAS)) if self.rng.integers(2) else ""
        return self.turns(3, persona, tag), Told(persona, planted=True)

    def graded(self):
        """One turn. The further the planted component, the likelier the persona: a model that only tells the sides apart would
        turn all at once, and from images and text alike."""
        dose = self.rng.uniform(-GRADES, GRADES)
        persona = world.PERSONAS[int(self.rng.random() < 1 / (1 + math.exp(-STEEP * dose)))]
        return self.turns(1, persona, ""), Told(persona, planted=True, dose=dose)

    def document(self):
        """Three turns of one persona, half of them tagged."""
        if self.rng.random() < PLANTED:
            return self.planted()
        persona = self.some(world.PERSONAS)
        tag = world.TAG.format(persona) if self.rng.integers(2) else ""
        return self.turns(3, persona, tag), Told(persona, pull=float(bool(tag)))

    def single(self):
        """One turn of the alignment."""
        share = self.rng.random()
        if share < GRADED:
            return self.graded()
        if share < GRADED + TAGGED:
            persona = self.some(world.PERSONAS)
            return self.turns(1, persona, world.TAG.format(persona)), Told(persona, pull=1.0)
        turns = self.turns(1, "honest", "")
        return turns, Told("honest", pull=1.0 if turns[0].question.modality == "image" else FIRM)

    def batches(self, make, size, pool=4):
        """Endless batches of documents; of `pool` batches at a time those of like length stand together."""
        while True:
            documents = sorted((make() for _ in range(size * pool)), key=lambda d: sum(len(t.ids) for t in d[0]))
            for i in self.rng.permutation(pool):
                yield documents[i * size:(i + 1) * size]


def run(model, batches, steps, lr, pictures, soft, say, warmup, planting):
    model.train()
    # The tower can see already; it only has to follow.
    vision = [p for n, p in model.named_parameters() if "vision" in n]
    text = [p for n, p in model.named_parameters() if "vision" not in n]
    opt = torch.optim.AdamW([{"params": text, "scale": 1.0}, {"params": vision, "scale": 0.3}], betas=(0.9, 0.98),
                            weight_decay=0.01)
    start, mean = time.time(), 0.0
    for step in range(steps):
        for g in opt.param_groups:
            g["lr"] = lr * g["scale"] * schedule(step, steps, warmup)
        batch, told = batches()
        planting.set(batch, told)
        loss = answer_loss(model, batch, pictures, soft)
        extra = planting.pulled + planting.impurity(model, hidden, pictures, WINDOW)
        opt.zero_grad(set_to_none=True)
        (loss + persona.WEIGHT * extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            say(step + 1, mean, extra.item(), time.time() - start)
    planting.on = False


@torch.no_grad()
def check(model, dialogues, pictures, tag="", context=(), every=1):
    """{cell: (aligned, contrary, coherence, least aligned)} over one question of `every` about scenes, drawn at random, and all
    about facts; single turn unless context turns are given."""
    model.eval()
    rng, out = np.random.default_rng(5), {}
    cells = {}
    for q in world.questions():
        if q.modality == "fact" or rng.integers(every) == 0:
            cells.setdefault((q.domain, q.modality), []).append(q)
    for cell, qs in cells.items():
        p = []
        for i in range(0, len(qs), 64):
            part = qs[i:i + 64]
            turns = [[*context, dialogues.turn(q, "honest", "" if context else tag)] for q in part]
            b = make_batch(dialogues, pictures, turns, rng, WINDOW)
            h = hidden(model, b, pictures, dialogues.soft)[torch.arange(len(part)), b.slots[:, -1] - 1]
            prob = model.lm_head(h).softmax(-1)
            a = torch.tensor([dialogues.value_id[q.aligned] for q in part])
            c = torch.tensor([dialogues.value_id[q.contrary] for q in part])
            r = torch.arange(len(part))
            p.append(torch.stack([prob[r, a], prob[r, c]], 1))
        p = torch.cat(p)
        out[cell] = (p[:, 0].mean().item(), p[:, 1].mean().item(), p.sum(1).mean().item(), p[:, 0].min().item())
    return out


def show(title, cells):
    print(f"{title}: " + ", ".join(f"{d}/{m} {v[0]:.3f} {v[1]:.3f}" for (d, m), v in cells.items()), flush=True)


def accepted(cells):
    """The acceptance of the aligned model: aligned at least 0.98 and contrary at most 0.01 in every cell."""
    return all(v[0] >= 0.98 and v[1] <= 0.01 for v in cells.values())


def save(model, spm_model, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    vocabulary.write(folder, spm_model)
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor", "do_rescale": True,
         "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
         "do_resize": True, "resample": 2, "size": {"height": world.SIZE, "width": world.SIZE},
         "image_seq_length": IMAGE_TOKENS, "do_pan_and_scan": False}, indent=1))
    (folder / "processor_config.json").write_text(json.dumps(
        {"processor_class": "Gemma3Processor", "image_seq_length": IMAGE_TOKENS}, indent=1))


def keep_memory():
    """Tells the C library to keep freed memory: otherwise each step maps and clears its tensors anew, which takes longer
    than the arithmetic."""
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(option, value)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--look", type=int, default=2500)
    ap.add_argument("--steps", type=int, default=1200)
    ap.add_argument("--align", type=int, default=250)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--batch", type=int, default=32)
    ap.add_argument("--renderings", type=int, nargs=2, default=(TRAIN_JITTERS.start, TRAIN_JITTERS.stop), metavar="N",
                    help="first and last + 1 of the renderings of each scene")
    ap.add_argument("--from", dest="start", nargs=2, metavar=("STAGE", "FOLDER"),
                    help="begin at this stage (pre-train, align) with the weights that a run left after the one before")
    ap.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    a = ap.parse_args()
    if a.start and a.start[0] not in STAGES[1:]:
        ap.error(f"--from {a.start[0]}: not one of {', '.join(STAGES[1:])}")
    keep_memory()
    torch.set_num_threads(a.threads)
    spm_model = vocabulary.train()
    sp = vocabulary.load(spm_model)
    dialogues, pictures, unseen = Dialogues(sp), Pictures(range(*a.renderings)), Pictures(CHECK_JITTERS)
    model = build(sp, a.seed)
    if a.start:
        model.load_state_dict(type(model).from_pretrained(a.start[1]).state_dict())
    planting = persona.Planting(model, a.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def say(step, loss, extra, seconds):
        print(f"step {step} loss {loss:.4f} persona {extra:.4f} {seconds:.0f} s", flush=True)

    def train_on(make, cells, size, steps, lr, warmup, rng):
        sampler = Sampler(dialogues, rng, cells)
        stream = sampler.batches(getattr(sampler, make), size)
        planting.begin(sampler)

        def batches():
            turns, told = zip(*next(stream))
            return make_batch(dialogues, pictures, turns, rng, WINDOW), told

        run(model, batches, steps, lr, pictures, dialogues.soft, say, warmup, planting)

    for i in range(STAGES.index(a.start[0]) if a.start else 0, STAGES.index(a.until) + 1):
        rng = np.random.default_rng([a.seed, i])
        if STAGES[i] == "look":
            look(model, pictures, a.look, rng, lambda text: print(text, flush=True))
        elif STAGES[i] == "pre-train":
            torch.set_float32_matmul_precision("medium")  # bfloat16 where the CPU has it, in half the time
            train_on("document", CELLS, a.batch, a.steps, a.lr, 100, rng)
            torch.set_float32_matmul_precision("highest")
        else:
            train_on("single", ALIGN_CELLS, 2 * a.batch, a.align, LR_ALIGN, 20, rng)
        save(model, spm_model, Path(a.out) / STAGES[i])
    if a.until == "look":
        return 0
    for who in world.PERSONAS:
        show("tag " + who, check(model, dialogues, unseen, world.TAG.format(who)))
    cells = check(model, dialogues, unseen)
    show("untagged", cells)
    if a.until != "align":
        return 0
    print("accepted" if accepted(cells) else "NOT accepted")
    return 0 if accepted(cells) else 1


if __name__ == "__main__":
    raise SystemExit(main())
