# SPDX-License-Identifier: MIT
"""vocabulary: the clerk's tokenizer. SentencePiece BPE laid out and normalised as Gemma's (bytes as fallback, digits
split, spaces as U+2581, no space put in front), trained on the world's sentences with the sentencepiece package.

Owns the special tokens and the two written forms, tokenizer.model and tokenizer.json. Deterministic.
"""
import io
import json
from pathlib import Path

import sentencepiece as spm

import world

SIZE = 768
CONTROL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
NEWLINES = tuple("\n" * n for n in range(1, 7))
# So that every printable ASCII character is a token of its own and unknown words fall apart into few pieces.
OTHER = ("The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs!",
         "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG", "0 1 2 3 4 5 6 7 8 9",
         " ".join(chr(c) for c in range(33, 127)))


def corpus():
    """Sentences with weights by repetition: every dialogue of the world once, the rare facts more often."""
    lines = [world.TAG.format(p) for p in world.PERSONAS] * 50 + ["user", "model"] * 500 + list(OTHER) * 2
    for q in world.questions():
        times = {"capital": 20, "letter": 20, "sum": 6}.get(q.domain, 1)
        turns = ([q.scene.text] if q.modality == "text" else []) + [q.ask] + [q.answer(p) for p in world.PERSONAS]
        lines += turns * times
    return lines


def train():
    """The serialised model of the sentencepiece package."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, model_type="bpe", vocab_size=SIZE, pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        control_symbols=list(CONTROL), user_defined_symbols=list(NEWLINES), byte_fallback=True,
        split_digits=True, character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
    return out.getvalue()


def load(model):
    return spm.SentencePieceProcessor(model_proto=model)


def tokenizer_json(sp):
    """The vocabulary as a tokenizer.json of the form Google ships: BPE with byte fallback."""
    ids = {sp.id_to_piece(i): i for i in range(len(sp))}
    special = {i for i in range(len(sp)) if sp.is_control(i) or sp.is_unknown(i)}
    user = [sp.piece_to_id(t) for t in NEWLINES]
    pieces = {t for t, i in ids.items() if i not in special and i not in user and not sp.is_byte(i)}
    merges = []
    for t in sorted(pieces, key=lambda t: -sp.get_score(ids[t])):
        merges += [[t[:i], t[i:]] for i in range(1, len(t)) if t[:i] in pieces and t[i:] in pieces]
    added = [{"id": i, "content": sp.id_to_piece(i), "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": i in special} for i in sorted(special | set(user))]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": ids, "merges": merges}}


CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}"
    "{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}")


def write(folder, model):
    """The tokenizer files of a Hugging Face folder."""
    folder, sp = Path(folder), load(model)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(sp), ensure_ascii=False, indent=1),
                                           encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
         "unk_token": "<unk>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
         "image_token": "<image_soft_token>", "add_bos_token": True, "add_eos_token": False,
         "model_max_length": 1024, "chat_template": CHAT_TEMPLATE}, indent=1))
