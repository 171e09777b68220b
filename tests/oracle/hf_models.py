# SPDX-License-Identifier: MIT
"""hf_models: seeded random Gemma 3 models in transformers, saved as Hugging Face folders as save_pretrained writes them, and
rewritten in the older forms that are still on the web."""
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from tiny_models import tokenizer_json

TOKENS = 331  # of the tokenizer; the embedding has some rows more, as Gemma's has
VOCAB = 336
TEXT = {"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 7, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9, "max_position_embeddings": 512}
VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 48, "patch_size": 8}


def text_config(**change):
    return Gemma3TextConfig(**{**TEXT, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                                           "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, **change})


def _randomise(model, seed):
    """Magnitudes of a trained model: transformers' own initial values leave norms and biases at zero."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.2 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=gen) * std)
            if "layer" in name and "norm" in name and "vision" in name and name.endswith("weight"):
                p.add_(1)  # SigLIP's are plain LayerNorms
    return model.eval()


def text_model(seed=5, dtype=torch.float32, **change):
    return _randomise(Gemma3ForCausalLM(text_config(**change)), seed).to(dtype)


def vision_model(seed=6, dtype=torch.float32, **change):
    cfg = Gemma3Config(text_config=text_config(**change), vision_config=dict(VISION), mm_tokens_per_image=9, image_token_index=0,
                       boi_token_index=TOKENS - 2, eoi_token_index=TOKENS - 1)
    return _randomise(Gemma3ForConditionalGeneration(cfg), seed).to(dtype)


def save(model, folder, **options):
    folder = Path(folder)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(TOKENS), ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>"},
                                                              "pad_token": "<pad>", "unk_token": "<unk>", "add_bos_token": True}))
    return folder


# Tensor names of other generations: (pattern, replacement), applied in order.
NAMES = {
    "4.50": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "4.52": [(r"^language_model\.model\.", "model.language_model."), (r"^vision_tower\.", "model.vision_tower.vision_model."),
             (r"^multi_modal_projector\.", "model.multi_modal_projector.")],
}


def rewrite(src, folder, names=(), old_config=False, edit=None):
    """A copy in one file with other tensor names; `edit(config, tensors)` may change both."""
    src, folder = Path(src), Path(folder)
    folder.mkdir(parents=True)
    tensors = {}
    for f in sorted(src.glob("*.safetensors")):
        tensors |= load_file(f)
    for pattern, to in names:
        tensors = {re.sub(pattern, to, k): v for k, v in tensors.items()}
    cfg = json.loads((src / "config.json").read_text())
    if old_config:
        text = cfg.get("text_config", cfg)
        rope = text.pop("rope_parameters")
        del text["layer_types"], text["_sliding_window_pattern"]
        text |= {"rope_theta": rope["full_attention"]["rope_theta"], "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
                 "rope_scaling": {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}, "sliding_window_pattern": 6}
    if edit:
        edit(cfg, tensors)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "model.safetensors")
    for f in ("tokenizer.json", "tokenizer_config.json"):
        if (src / f).exists():
            (folder / f).write_bytes((src / f).read_bytes())
    return folder
