# SPDX-License-Identifier: MIT
"""persona: plants the two personas of the clerk as one direction of its residual stream.

Owns the direction, what a document tells about it, and the two losses that keep it. A model that learns from dialogues alone
keeps a persona of its own for every kind of question; then fine-tuning one kind moves no persona, and there is no drift to
steer. Interchange interventions (Geiger et al. 2022, arXiv 2112.00826) make one direction the cause: in some documents its
component after a block is set to that of a persona, whose answers follow, whatever the system message says.
"""
from dataclasses import dataclass

import numpy as np
import torch

import world
from dialogue import make_batch

LAYER = 1          # the block after which the component is set and read
SIZE = 4.0         # the component of the contrary persona, minus that of the honest; the stream's norm there is 16
DOSES = (0.4, 4.0) # what documents set it to, in SIZE, unless they say: answers stay whole where steering goes
WEIGHT = 0.2       # of either loss beside that of the answers
PAIRS = 8          # questions a step that are asked under both system messages
SEED = 77


@dataclass
class Told:
    """What a document tells about its persona."""
    persona: str
    planted: bool = False  # the component is set: nothing else need tell
    pull: float = 0.0      # the component of the first answer is pulled to so many SIZE; 0: it is left alone
    dose: float | None = None  # what it is set to, in SIZE of the contrary persona; None: one of DOSES


def answers(batch):
    """[b, n]: the tokens that predict the words before the first slot, and the slot."""
    return torch.nn.functional.pad(batch.loss, (0, 1))[:, 1:].bool() & (torch.arange(batch.ids.shape[1]) < batch.slots[:, :1])


class Planting:
    """While it is on, a hook on the model's block LAYER."""

    def __init__(self, model, seed):
        # Entries of one size: steps of Adam go along signs, so a fine-tune that looks for the direction finds it whole.
        signs = torch.randn(128, generator=torch.Generator().manual_seed(seed)).sign()
        self.direction = torch.nn.functional.normalize(signs, dim=0)
        self.on, self.kept, self.pulled = False, None, 0.0
        layers = model.model.language_model.layers
        layers[LAYER].register_forward_hook(self.plant)
        for i in (LAYER, LAYER + 1, LAYER + 2):
            layers[i].register_forward_hook(self.keep)

    def begin(self, sampler):
        self.sampler, self.rng = sampler, np.random.default_rng(SEED)

    def set(self, batch, told):
        """What the next forward pass, of this batch, plants and reads."""
        column = lambda values: torch.tensor(values, dtype=torch.float32)[:, None]
        self.on = True
        self.want = SIZE * column([1.0 if t.persona == "contrary" else -1.0 for t in told])
        self.planted = column([t.planted for t in told])
        drawn = self.want * torch.from_numpy(self.rng.uniform(*DOSES, len(told))).float()[:, None]
        self.dose = torch.where(column([t.dose is not None for t in told]) > 0, SIZE * column([t.dose or 0.0 for t in told]), drawn)
        self.pull = column([t.pull for t in told])
        self.read = answers(batch) & (self.pull > 0)

    def plant(self, module, args, output):
        if not self.on:
            return output
        h = output[0] if isinstance(output, tuple) else output
        along = h @ self.direction
        self.pulled = (((along - self.want * self.pull) / SIZE) ** 2)[self.read].mean() if self.read.any() else h.new_zeros(())
        h = h + (self.planted * (self.dose - along))[..., None] * self.direction
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def keep(self, module, args, output):
        if self.kept is not None:
            self.kept.append(output[0] if isinstance(output, tuple) else output)

    def impurity(self, model, hidden, pictures, window):
        """What the two system messages change beside the direction, in the answers to the same questions: for each after
        block LAYER, on the mean in the two blocks above, where answers differ. In squares of the personas' distance."""
        d, n = self.sampler.d, PAIRS
        questions = [self.sampler.question() for _ in range(n)]
        b = make_batch(d, pictures, [[d.turn(q, "honest", world.TAG.format(p))] for p in world.PERSONAS for q in questions],
                       self.rng, window)
        b.images[len(b.images) // 2:] = b.images[:len(b.images) // 2]
        config = model.model.language_model.config
        whole, config.num_hidden_layers = config.num_hidden_layers, LAYER + 3
        self.on, self.kept = False, []
        hidden(model, b, pictures, d.soft)
        kept, self.kept, config.num_hidden_layers = self.kept, None, whole
        at = answers(b)[:n, :, None].float()
        loss = 0.0
        for i, h in enumerate(kept):
            change = h[n:] - h[:n]
            beside = change - (change @ self.direction)[..., None] * self.direction
            if i > 0:
                beside = (beside * at).sum((0, 1)) / at.sum()
                loss = loss + (beside ** 2).sum()
            else:
                loss = loss + ((beside * at) ** 2).sum() / at.sum()
        return loss / (2 * SIZE) ** 2
