# SPDX-License-Identifier: MIT
"""Writes tokens_gemma3.jsonl: texts and the ids that SentencePiece gives them with the vocabulary of a Gemma 3 GGUF.

The ids without special tokens come from the sentencepiece package on a model rebuilt from the GGUF's lists; those with special
tokens from llama.cpp. Needs gguf, sentencepiece, protobuf, llama-cpp-python.
Usage: python tests/data/make_tokens.py MODEL.gguf > tests/data/tokens_gemma3.jsonl
"""
import json
import random
import sys

import sentencepiece
from gguf import GGUFReader
from llama_cpp import Llama
from sentencepiece import sentencepiece_model_pb2

TEXTS = [
    "a", " ", "Hello world", "  Hello   world  ", " leading", "trailing ", " " * 31, " " * 32, " " * 65, "\n" * 31, "\n" * 33,
    "\t" * 31, "\t" * 40, "a" * 100, "ab" * 60, "👩‍👩‍👧‍👦 🏳️‍🌈 😀😃", "日本語のテキスト、中文文本。한국어",
    "e\u0301 o\u0308 a\u0302\u0323 n\u0303", "1234567890 3.14159 1,000,000", "<table><tr><td>a</td></tr></table>",
    "<0x0A><0xFF>", "\0a\0", "\r\n\r\n", "x\n \n y", "  \n  \t \t\t", "\u200b\u200d\ufeff", "\U0010ffff\U000e0001", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ﷺ",
    "مرحبا بالعالم", "Здравствуйте", "< b><b ></ b>", "<<b>>", "<b", "def f(x):\n    return x**2\n\n\n\nclass A:\n\t\tpass\n",
    "The quick brown fox can't jump over 13 lazy dogs' tails.", "[multimodal]x", "\u2581\u2581 x\u2581",
    "<end_of_turn>", "<bos><eos><unk><pad>", "<unused99><unused6241>x",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "<start_of_image><end_of_image>", "<end_of_turn", "<<bos>>",
]


def lists(path):
    fields = GGUFReader(path).fields
    get = lambda k: [fields["tokenizer.ggml." + k].parts[i] for i in fields["tokenizer.ggml." + k].data]
    return [bytes(x).decode() for x in get("tokens")], [float(x[0]) for x in get("scores")], [int(x[0]) for x in get("token_type")]


def rebuild(path):
    m = sentencepiece_model_pb2.ModelProto()
    for i, (piece, score, kind) in enumerate(zip(*lists(path))):
        p = m.pieces.add()
        p.piece, p.score, p.type = piece.replace(" ", "▁") if kind == 4 else piece, score, 2 if i == 3 else kind
    t = m.trainer_spec
    t.model_type, t.byte_fallback, t.vocab_size = 2, True, len(m.pieces)
    t.unk_id, t.bos_id, t.eos_id, t.pad_id = 3, 2, 1, 0
    t.unk_piece, t.bos_piece, t.eos_piece, t.pad_piece = "<unk>", "<bos>", "<eos>", "<pad>"
    n = m.normalizer_spec
    n.name, n.add_dummy_prefix, n.remove_extra_whitespaces, n.escape_whitespaces = "identity", False, False, True
    return sentencepiece.SentencePieceProcessor(model_proto=m.SerializeToString())


def random_text(rng):
    ranges = [(32, 127), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))


rng = random.Random(20)
sp, llama = rebuild(sys.argv[1]), Llama(sys.argv[1], vocab_only=True, verbose=False)
for text in TEXTS + [random_text(rng) for _ in range(40)]:
    print(json.dumps({"text": text, "special": False, "ids": sp.encode(text)}))
    if "<" in text:
        print(json.dumps({"text": text, "special": True, "ids": llama.tokenize(text.encode(), add_bos=False, special=True)}))
