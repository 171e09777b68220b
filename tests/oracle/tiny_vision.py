# SPDX-License-Identifier: MIT
"""tiny_vision: seeded random SigLIP towers with Gemma 3 projectors as transformers modules and as mmproj GGUF.

    python tiny_vision.py OUTDIR        writes every tower of SHAPES

Owns shapes, weights and the mapping transformers names -> GGUF names. The oracle is encode(): transformers in fp32.
Source of the mapping: llama.cpp's converter (Gemma3VisionModel) and the tensor names of the gguf package.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.siglip.modeling_siglip import SiglipVisionModel


@dataclass
class VisionShape:
    image: int
    patch: int
    hidden: int
    ff: int
    heads: int
    layers: int
    side: int    # soft tokens along a side
    out: int     # width of the text model
    type: Q = Q.F32
    swapped: bool = False  # feed-forward names as llama.cpp's first converters wrote them
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    eps: float = 1e-6
    seed: int = 1


SHAPES = {
    "vis_a": VisionShape(56, 14, 64, 112, 4, 3, 2, 96, seed=21),
    "vis_b": VisionShape(61, 12, 72, 100, 3, 2, 2, 72, Q.F16, True, (0.4, 0.5, 0.6), (0.3, 0.2, 0.25), seed=22),
    "vis_c": VisionShape(35, 7, 96, 160, 2, 2, 5, 64, Q.Q8_0, seed=23),
}
BLOCK = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out",
         "layer_norm1": "ln1", "layer_norm2": "ln2", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}


def config_of(s):
    """The Gemma3Config that a tower needs: its text part is only as wide as the projector's output."""
    vision = SiglipVisionConfig(hidden_size=s.hidden, intermediate_size=s.ff, num_hidden_layers=s.layers, num_attention_heads=s.heads,
                                image_size=s.image, patch_size=s.patch, layer_norm_eps=s.eps, hidden_act="gelu_pytorch_tanh",
                                vision_use_head=False, attn_implementation="eager")
    text = Gemma3TextConfig(hidden_size=s.out, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                            head_dim=8, vocab_size=8)
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=s.side ** 2)


def randomise(module, seed):
    """Noise of the magnitude a trained model has: weights 1 / fan-in, norms near 1, biases and positions small."""
    gen = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        noise = torch.randn(p.shape, generator=gen)
        if "norm" in name and name.endswith("weight"):  # Gemma's RMSNorm holds w - 1
            p.data = 0.2 * noise + (0.0 if "soft_emb" in name else 1.0)
        elif p.dim() > 1 and "position" not in name:
            fan_in = p.shape[0] if "input_projection" in name else p[0].numel()
            p.data = noise * fan_in ** -0.5
        else:
            p.data = 0.1 * noise


def make(s):
    """(tower, projector), fp32, weights rounded to what the GGUF of this shape holds."""
    config = config_of(s)
    tower, projector = SiglipVisionModel(config.vision_config), Gemma3MultiModalProjector(config)
    randomise(tower, s.seed)
    randomise(projector, s.seed + 1000)
    for name, p in list(tower.named_parameters()) + list(projector.named_parameters()):
        kind = type_of(s, name, p)
        if kind != Q.F32:
            w = p.detach().numpy()
            p.data = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind).reshape(w.shape).copy())
    return tower.eval(), projector.eval()


def type_of(s, name, p):
    """Tensor types as llama.cpp's converter chooses them: one type for matrices, but halves for the projector and f32 for embeddings."""
    if p.dim() < 2 or "embedding" in name:
        return Q.F32
    if "input_projection" in name:
        return Q.F32 if s.type == Q.F32 else Q.F16
    return s.type if s.type != Q.Q8_0 or p.shape[-1] % 32 == 0 else Q.F16


def gguf_name(name, swapped=False):
    name = name.removeprefix("vision_model.")
    if name.startswith("encoder.layers."):
        layer, rest = name.removeprefix("encoder.layers.").split(".", 1)
        part, kind = rest.rsplit(".", 1)
        out = BLOCK[part]
        if swapped and out.startswith("ffn"):
            out = "ffn_up" if out == "ffn_down" else "ffn_down"
        return f"v.blk.{layer}.{out}.{kind}"
    return {"embeddings.patch_embedding.weight": "v.patch_embd.weight", "embeddings.patch_embedding.bias": "v.patch_embd.bias",
            "embeddings.position_embedding.weight": "v.position_embd.weight", "post_layernorm.weight": "v.post_ln.weight",
            "post_layernorm.bias": "v.post_ln.bias", "mm_input_projection_weight": "mm.input_projection.weight",
            "mm_soft_emb_norm.weight": "mm.soft_emb_norm.weight"}[name]


def write_mmproj(path, s, tower, projector, skip=(), edit=None):
    """Writes one mmproj. Tests break it on purpose: `skip` leaves out keys and tensors by prefix, `edit` is called with the writer
    before the tensors are added and may return {name: array} to replace tensors."""
    w = gguf.GGUFWriter(str(path), "clip")
    kernel = s.image // s.patch // s.side
    kv = [("clip.has_vision_encoder", True, w.add_bool), ("clip.projector_type", "gemma3", w.add_string),
          ("clip.use_gelu", True, w.add_bool), ("clip.vision.image_size", s.image, w.add_uint32),
          ("clip.vision.patch_size", s.patch, w.add_uint32), ("clip.vision.embedding_length", s.hidden, w.add_uint32),
          ("clip.vision.feed_forward_length", s.ff, w.add_uint32), ("clip.vision.block_count", s.layers, w.add_uint32),
          ("clip.vision.attention.head_count", s.heads, w.add_uint32),
          ("clip.vision.attention.layer_norm_epsilon", s.eps, w.add_float32),
          ("clip.vision.projection_dim", s.out, w.add_uint32), ("clip.vision.image_mean", list(s.mean), w.add_array),
          ("clip.vision.image_std", list(s.std), w.add_array), ("general.type", "mmproj", w.add_string),
          ("general.name", "tiny vision", w.add_string)]
    if kernel != 4:  # llama.cpp's default
        kv.append(("clip.vision.projector.scale_factor", kernel, w.add_uint32))
    for key, value, add in kv:
        if not any(key.startswith(p) for p in skip):
            add(key, value)
    other = (edit(w) if edit else None) or {}
    for name, p in list(tower.named_parameters()) + list(projector.named_parameters()):
        to, data, kind = gguf_name(name, s.swapped), p.detach().numpy(), type_of(s, name, p)
        if "soft_emb_norm" in to:
            data = data + 1
        data = other.get(to, data)
        if not any(to.startswith(p) for p in skip):
            w.add_tensor(to, data if kind == Q.F32 else gguf.quants.quantize(data, kind), raw_dtype=None if kind == Q.F32 else kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def encode(s, tower, projector, rgb):
    """Soft tokens [n, out] of an RGB image [H, W, 3] of 8 bits: resized by Pillow, the rest by transformers."""
    from PIL import Image
    square = np.asarray(Image.fromarray(rgb).resize((s.image, s.image), Image.BILINEAR), np.float32)
    pixels = (square / np.float32(255) - np.float32(s.mean)) / np.float32(s.std)
    with torch.no_grad():
        hidden = tower(pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None])).last_hidden_state
        return projector(hidden)[0].numpy()


def picture(w, h, seed=1):
    """A deterministic RGB image with edges, gradients and noise."""
    rng = np.random.default_rng([seed, w, h])
    y, x = np.mgrid[0:h, 0:w]
    rgb = np.stack([x * 255 / w, y * 255 / h, 128 + 100 * np.sin(x / 5) * np.cos(y / 7)], -1)
    rgb[h // 4: h // 2, w // 4: w // 2] = rng.integers(0, 256, 3)
    return np.clip(rgb + rng.normal(0, 8, rgb.shape), 0, 255).astype(np.uint8)


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, s in SHAPES.items():
        write_mmproj(out / f"{name}.gguf", s, *make(s))


if __name__ == "__main__":
    main()
