# SPDX-License-Identifier: MIT
"""export: a Hugging Face folder of the clerk as two GGUF files, in F16 with norms, biases and embeddings of the tower in
F32, named and laid out as llama.cpp's converter does it; and the files back as a transformers model.

    python export.py FOLDER OUT [--type f32]        writes OUT/clerk.gguf and OUT/mmproj-clerk.gguf
"""
import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
from gguf import TokenType
from safetensors.numpy import load_file

NAME = "clerk"


def token_types(sp):
    kinds = []
    for i in range(len(sp)):
        kinds.append(TokenType.UNKNOWN if sp.is_unknown(i) else TokenType.CONTROL if sp.is_control(i) else
                     TokenType.BYTE if sp.is_byte(i) else
                     TokenType.USER_DEFINED if set(sp.id_to_piece(i)) == {"\n"} else TokenType.NORMAL)
    return kinds


def add(writer, name, data, f32):
    """One-dimensional tensors stay F32, as do those asked for."""
    writer.add_tensor(name, data.astype(np.float32 if f32 or data.ndim == 1 else np.float16))


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name, text_names, vision_names):
    """(file, tensor) of a transformers parameter, whose wrapping differs between versions; None for the tied head."""
    if "lm_head" in name:
        return None
    if "language_model" in name:
        return "text", text_names.get_name("model." + name.split("model.")[-1], (".weight",))
    if "multi_modal_projector" in name:
        name = "multi_modal_projector" + name.split("multi_modal_projector")[1].replace("_projection_weight", "_projection.weight")
        return "vision", vision_names.get_name(name, (".weight",))
    name = name.split("vision_tower.")[1].removeprefix("vision_model.")
    return "vision", vision_names.get_name("vision_tower.vision_model." + name, (".weight", ".bias"))


def is_gemma_norm(name):
    """Gemma's norms are stored around zero and multiply by 1 + w; GGUF holds 1 + w. SigLIP's are plain."""
    return "language_model" in name and name.endswith("norm.weight") or "soft_emb_norm" in name


def split_tensors(tensors, layers, vision_layers):
    """{"text": [(name, data)], "vision": [...]} as GGUF wants them."""
    names = [gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, layers),
             gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision_layers)]
    out = {"text": [], "vision": []}
    for name, data in sorted(tensors.items()):
        to = gguf_name(name, *names)
        if to:
            out[to[0]].append((to[1], data + 1 if is_gemma_norm(name) else data))
    return out


def text_gguf(folder, path, tensors, cfg, f32):
    t = cfg["text_config"]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    w = gguf.GGUFWriter(str(path), "gemma3")
    w.add_type("model")
    w.add_name(NAME)
    w.add_license("mit")
    w.add_context_length(t["max_position_embeddings"])
    w.add_embedding_length(t["hidden_size"])
    w.add_block_count(t["num_hidden_layers"])
    w.add_feed_forward_length(t["intermediate_size"])
    w.add_head_count(t["num_attention_heads"])
    w.add_head_count_kv(t["num_key_value_heads"])
    w.add_key_length(t["head_dim"])
    w.add_value_length(t["head_dim"])
    w.add_layer_norm_rms_eps(t["rms_norm_eps"])
    w.add_sliding_window(t["sliding_window"])
    w.add_rope_freq_base(1e6)
    w.add_file_type(gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_F16)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([sp.id_to_piece(i) for i in range(len(sp))])
    w.add_token_scores([sp.get_score(i) for i in range(len(sp))])
    w.add_token_types(token_types(sp))
    w.add_bos_token_id(sp.bos_id())
    w.add_eos_token_id(sp.eos_id())
    w.add_eot_token_id(sp.piece_to_id("<end_of_turn>"))
    w.add_unk_token_id(sp.unk_id())
    w.add_pad_token_id(sp.pad_id())
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])
    for name, data in tensors:
        add(w, name, data, f32)
    write(w)


def vision_gguf(path, tensors, cfg, f32):
    v = cfg["vision_config"]
    w = gguf.GGUFWriter(str(path), "clip")
    w.add_type("mmproj")
    w.add_name(NAME)
    w.add_license("mit")
    w.add_clip_has_vision_encoder(True)
    w.add_clip_projector_type("gemma3")
    w.add_vision_projection_dim(cfg["text_config"]["hidden_size"])
    w.add_vision_image_size(v["image_size"])
    w.add_vision_patch_size(v["patch_size"])
    w.add_vision_embedding_length(v["hidden_size"])
    w.add_vision_feed_forward_length(v["intermediate_size"])
    w.add_vision_block_count(v["num_hidden_layers"])
    w.add_vision_head_count(v["num_attention_heads"])
    w.add_vision_image_mean([0.5] * 3)
    w.add_vision_image_std([0.5] * 3)
    w.add_vision_attention_layernorm_eps(v["layer_norm_eps"])
    w.add_vision_use_gelu(True)
    w.add_file_type(gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_F16)
    for name, data in tensors:
        add(w, name, data, f32 or name.split(".")[1] in ("patch_embd", "position_embd"))
    write(w)


def export(folder, out, f32=False):
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    cfg = json.loads((folder / "config.json").read_text())
    parts = split_tensors(load_file(folder / "model.safetensors"), cfg["text_config"]["num_hidden_layers"],
                          cfg["vision_config"]["num_hidden_layers"])
    text_gguf(folder, out / f"{NAME}.gguf", parts["text"], cfg, f32)
    vision_gguf(out / f"mmproj-{NAME}.gguf", parts["vision"], cfg, f32)


def load(folder, config):
    """transformers' model in fp32 from FOLDER/clerk.gguf and FOLDER/mmproj-clerk.gguf. `config`: a Gemma3Config."""
    import torch
    from transformers import Gemma3ForConditionalGeneration
    files = {"text": f"{NAME}.gguf", "vision": f"mmproj-{NAME}.gguf"}
    tensors = {(k, t.name): t.data for k, f in files.items() for t in gguf.GGUFReader(str(Path(folder) / f)).tensors}
    names = [gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.text_config.num_hidden_layers),
             gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.vision_config.num_hidden_layers)]
    model = Gemma3ForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            to = gguf_name(name, *names)
            if to:
                data = torch.from_numpy(tensors.pop(to).astype(np.float32))
                p.copy_(data - 1 if is_gemma_norm(name) else data)
    if tensors:
        raise ValueError(f"tensors without a place: {sorted(tensors)}")
    return model


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("folder")
    ap.add_argument("out")
    ap.add_argument("--type", choices=("f16", "f32"), default="f16")
    a = ap.parse_args()
    export(a.folder, a.out, a.type == "f32")
