# SPDX-License-Identifier: MIT
"""gemma3_vlm: a tiny text model and a tiny tower joined to transformers' Gemma3ForConditionalGeneration: the oracle of rows with
images, from pixels to log-probabilities and gradients.

Owns the join, the tokens of prompts with images and the masks (as transformers makes them from token types). The parts come from
gemma3_ref and tiny_vision; the text model is shared with its Ref, so that an adapter attached there (lora.attached) counts here.
"""
import numpy as np
import torch
from PIL import Image
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import tiny_vision

SOFT = 0  # id of the soft tokens where the vocabulary has none of that name; keel takes the same


class Vlm:
    def __init__(self, ref, shape, tower, projector):
        self.ref, self.tok, self.shape, self.n_soft = ref, ref.tok, shape, shape.side ** 2
        self.soft = ref.tok.id.get("<image_soft_token>", SOFT)
        vision = tiny_vision.config_of(shape).vision_config
        config = Gemma3Config(text_config=ref.config.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=self.n_soft,
                              image_token_index=self.soft, boi_token_index=ref.tok.id["<start_of_image>"],
                              eoi_token_index=ref.tok.id["<end_of_image>"], attn_implementation="eager")
        with torch.device("meta"):
            self.model = Gemma3ForConditionalGeneration(config)
        self.model.model.language_model, self.model.lm_head = ref.model.model, ref.model.lm_head
        self.model.model.vision_tower, self.model.model.multi_modal_projector = tower, projector
        self.model.eval()
        for p in list(tower.parameters()) + list(projector.parameters()):
            p.requires_grad_(False)

    def pixels(self, file):
        s = self.shape
        rgb = Image.open(file).convert("RGB").resize((s.image, s.image), Image.BILINEAR)
        return ((np.asarray(rgb, np.float32) / np.float32(255) - np.float32(s.mean)) / np.float32(s.std)).transpose(2, 0, 1)

    def logits(self, ids, files=()):
        ids = torch.tensor([ids])
        kw = {}
        if files:
            kw = {"pixel_values": torch.from_numpy(np.stack([self.pixels(f) for f in files])),
                  "token_type_ids": (ids == self.soft).long()}
        return self.model(input_ids=ids, use_cache=False, **kw).logits[0]

    @torch.no_grad()
    def logprobs(self, ids, files=()):
        """log p(ids[i] | ids[:i]) for i = 1 .. n-1; those of soft tokens mean nothing."""
        lp = torch.log_softmax(self.logits(ids, files)[:-1].double(), -1)
        return lp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()

    @torch.no_grad()
    def greedy(self, ids, files, n):
        """(new ids, gap between the best two logits before each)"""
        new, gaps = list(ids), []
        for _ in range(n):
            top = torch.topk(self.logits(new, files)[-1], 2)
            gaps.append(float(top.values[0] - top.values[1]))
            new.append(int(top.indices[0]))
            if new[-1] in (self.tok.eos, self.tok.eot):
                break
        return new[len(ids):], gaps

    # --- tokens ----------------------------------------------------------------------------------

    def pieces(self, text):
        """A text with its placeholders replaced as Gemma3Processor does: str for text, int for a token."""
        out = []
        for i, part in enumerate(text.split("<image>")):
            if i:
                out += ["\n\n", self.tok.id["<start_of_image>"], *[self.soft] * self.n_soft, self.tok.id["<end_of_image>"], "\n\n"]
            out.append(part)
        return out

    def encode(self, pieces):
        """Texts that touch are tokenised as one."""
        ids, text = [], ""
        for p in [*pieces, None]:
            if isinstance(p, str):
                text += p
                continue
            ids += self.tok.encode(text, bos=False) if text else []
            text = ""
            ids += [] if p is None else [p]
        return ids

    def content(self, c):
        """A message's content, and the files that its parts name."""
        if isinstance(c, str):
            return self.pieces(c.strip()), []
        out, files = [], []
        for part in c:
            if part["type"] == "text":
                out.append(part["text"].strip())
            else:
                out += self.pieces("<image>")
                files.append(part.get("image") or part["image_url"]["url"])
        return out, files

    def row(self, row, open_=False):
        """(ids, mask, files) of a data row; mask is 1 where the token is learnt. open_: the prompt alone, as for score."""
        tok, files = self.tok, list(row.get("images", ()))
        if "messages" not in row:
            p = self.encode([tok.bos, *self.pieces(row["prompt"])])
            c = [] if open_ else tok.encode(row["completion"], bos=False) + ([tok.eot] if row.get("eos") else [])
            return p + c, [0] * len(p) + [1] * len(c), files
        ids, mask, start = [tok.bos], [0], tok.id["<start_of_turn>"]
        newline, system = tok.encode("\n", bos=False), ""
        for m in row["messages"]:
            if m["role"] == "system":
                system = m["content"] + "\n\n"
                continue
            bot = m["role"] == "assistant"
            body, more = self.content(m["content"])
            files += more
            head = [start] + tok.encode("model\n", bos=False) if bot else [start]
            body = self.encode(body if bot else ["user\n" + system, *body])
            system = "" if not bot else system
            ids += head + body + [tok.eot] + newline
            mask += [0] * len(head) + [int(bot)] * (len(body) + 1) + [0] * len(newline)
        if open_:
            ids += [start] + tok.encode("model\n", bos=False)
        return ids, mask, files

    def step_loss(self, _, rows):
        """As lora.step_loss() for rows with images; the adapter is attached to the shared text model."""
        rows = [self.row(r) for r in rows]
        n, total = sum(sum(m[1:]) for _, m, _ in rows), 0.0
        for ids, mask, files in rows:
            logits = self.logits(ids, files)[:-1]
            keep = torch.tensor(mask[1:]).bool()
            loss = torch.nn.functional.cross_entropy(logits[keep], torch.tensor(ids[1:])[keep], reduction="sum") / n
            loss.backward()
            total += loss.item()
        return total
