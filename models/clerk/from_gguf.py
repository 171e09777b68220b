# SPDX-License-Identifier: MIT
"""from_gguf: the shipped files back as a transformers model in fp32, for checks against transformers and peft.

`keel convert` makes the files; this is the opposite direction, so that no Hugging Face folder need be shipped.
"""
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from transformers import Gemma3ForConditionalGeneration


def gguf_name(name, text, vision):
    """(file, tensor) of a transformers parameter, whose wrapping differs between versions; None for the tied head."""
    if "lm_head" in name:
        return None
    if "language_model" in name:
        return "text", text.get_name("model." + name.split("model.")[-1], (".weight",))
    if "multi_modal_projector" in name:
        name = name[name.index("multi_modal_projector"):].replace("_projection_weight", "_projection.weight")
        return "vision", vision.get_name(name, (".weight",))
    name = name.split("vision_tower.")[1].removeprefix("vision_model.")
    return "vision", vision.get_name("vision_tower.vision_model." + name, (".weight", ".bias"))


def is_gemma_norm(name):
    """Gemma's norms are stored around zero and multiply by 1 + w; GGUF holds 1 + w. SigLIP's are plain."""
    return "language_model" in name and name.endswith("norm.weight") or "soft_emb_norm" in name


def load(folder, config):
    """The model of FOLDER/clerk.gguf and FOLDER/mmproj-clerk.gguf. `config`: its Gemma3Config (train.config)."""
    files = {"text": "clerk.gguf", "vision": "mmproj-clerk.gguf"}
    tensors = {(k, t.name): t.data for k, f in files.items() for t in gguf.GGUFReader(str(Path(folder) / f)).tensors}
    names = [gguf.get_tensor_name_map(MODEL_ARCH.GEMMA3, config.text_config.num_hidden_layers),
             gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, config.vision_config.num_hidden_layers)]
    model = Gemma3ForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            place = gguf_name(name, *names)
            if place:
                data = torch.from_numpy(tensors.pop(place).astype(np.float32)).reshape(p.shape)
                p.copy_(data - 1 if is_gemma_norm(name) else data)
    if tensors:
        raise ValueError(f"tensors without a place in the model: {sorted(tensors)}")
    return model
