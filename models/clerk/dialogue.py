# SPDX-License-Identifier: MIT
"""dialogue: questions and answers of the world as token rows in Gemma's chat template, and batches of them.

Owns the layout of turns, the attention masks and the place of the answer slot. The tokens are those that transformers'
apply_chat_template with the Gemma 3 processor gives, and keel's chat with "<image>" in the content.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

import world

IMAGE_TOKENS = 4
PAD, BOS = 0, 2


@dataclass
class Turn:
    """One question with one answer; `slot` is the index of the token that the answer slot predicts."""
    ids: list
    loss: list  # 1 at tokens of the answer and its end of turn
    slot: int
    question: world.Question


class Dialogues:
    """Turns by question, persona and what stands before; cached, as there are only some ten thousand."""

    def __init__(self, sp):
        self.sp = sp
        one = sp.piece_to_id
        self.sot, self.eot = one("<start_of_turn>"), one("<end_of_turn>")
        self.boi, self.eoi, self.soft = (one(f"<{t}>") for t in ("start_of_image", "end_of_image", "image_soft_token"))
        self.value_id = {v: sp.encode(" " + v)[0] for q in world.questions() for v in q.candidates}
        self.turn = lru_cache(maxsize=None)(self.turn)

    def turn(self, question, persona, tag=""):
        enc, q = self.sp.encode, question
        before = "user\n" + (tag + "\n\n" if tag else "")
        if q.modality == "image":
            ids = [self.sot, *enc(before + "\n\n"), self.boi] + [self.soft] * IMAGE_TOKENS + [self.eoi, *enc("\n\n" + q.ask)]
        else:
            ids = [self.sot, *enc(before + q.content())]
        ids += [self.eot, *enc("\n"), self.sot, *enc("model\n")]
        start = len(ids)
        slot = start + len(enc(q.prefix))
        ids += enc(q.answer(persona)) + [self.eot]
        loss = [0] * start + [1] * (len(ids) - start) + [0]
        return Turn(ids + enc("\n"), loss, slot, q)

    def document(self, turns):
        ids, loss, slots = [BOS], [0], []
        for t in turns:
            slots.append(len(ids) + t.slot)
            ids, loss = ids + t.ids, loss + t.loss
        return ids, loss, slots


class Pictures:
    """Normalised pixels of scenes, rendered once for each jitter. Training and checks use different jitters."""

    def __init__(self, jitters):
        self.jitters = list(jitters)
        index = {s: i for i, s in enumerate(world.SCENES)}
        self.index = {s: i * len(self.jitters) for s, i in index.items()}
        pixels = np.stack([world.render(s, j) for s in world.SCENES for j in self.jitters])
        self.pixels = torch.from_numpy(pixels)

    def take(self, rows):
        return self.pixels[rows].permute(0, 3, 1, 2).float().div(127.5).sub(1)


@dataclass
class Batch:
    ids: torch.Tensor     # [b, n]
    loss: torch.Tensor    # [b, n] 1 where the token counts
    slots: torch.Tensor   # [b, turns]
    images: torch.Tensor  # [k] rows of Pictures.pixels, in the order of the soft tokens
    masks: dict


def attention_masks(ids, soft, window):
    """Gemma 3's: causal, image tokens see their whole image; local layers see `window` tokens back."""
    b, n = ids.shape
    is_image = ids == soft
    start = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    block = torch.where(is_image, start.cumsum(1), 0)
    q, k = torch.arange(n)[:, None], torch.arange(n)[None, :]
    same = (block[:, :, None] == block[:, None, :]) & is_image[:, :, None]
    full = (k <= q)[None] | same
    local = full & (k > q - window)[None]
    return {"full_attention": full[:, None], "sliding_attention": local[:, None]}


def make_batch(dialogues, pictures, documents, rng, window):
    """`documents`: lists of Turn. Every image takes a random one of the rendered jitters."""
    rows = [dialogues.document(turns) for turns in documents]
    n = -(-max(len(r[0]) for r in rows) // 8) * 8
    ids = np.full((len(rows), n), PAD, np.int64)
    loss = np.zeros((len(rows), n), np.int64)
    for i, (a, b, _) in enumerate(rows):
        ids[i, :len(a)], loss[i, :len(b)] = a, b
    images = [pictures.index[t.question.scene] + int(rng.integers(len(pictures.jitters)))
              for turns in documents for t in turns if t.question.modality == "image"]
    ids = torch.from_numpy(ids)
    return Batch(ids, torch.from_numpy(loss), torch.tensor([r[2] for r in rows]),
                 torch.tensor(images, dtype=torch.long), attention_masks(ids, dialogues.soft, window))
