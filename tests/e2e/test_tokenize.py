# SPDX-License-Identifier: MIT
"""tokenize: ids equal the SentencePiece definition (oracle Spm, itself equal to llama.cpp), byte for byte."""
import random

import pytest

import texts
from keelcli import tokenize


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
def test_cases(keel, tiny_a, oracle, tmp_path, special):
    tok = oracle(tiny_a).tok
    for text in texts.TOKENIZER:
        if text:
            got = tokenize(keel, tiny_a, text, tmp_path, *(["--special"] if special else []))
            assert got == tok.encode(text, special=special), repr(text)


def test_empty_text_is_bos(keel, tiny_a):
    assert keel("tokenize", "-m", tiny_a, "--json", "").json["ids"] == [2]


def test_no_bos_and_argument(keel, tiny_a, oracle):
    text = "the clerk counts  the stones"
    tok = oracle(tiny_a).tok
    assert keel("tokenize", "-m", tiny_a, "--json", "--no-bos", text).json["ids"] == tok.encode(text, bos=False)
    assert keel("tokenize", "-m", tiny_a, "--json", text).json["ids"] == tok.encode(text)


@pytest.mark.parametrize("seed", range(3))
def test_random_text(keel, tiny_a, oracle, tmp_path, seed):
    """A long random mixture of pieces, control names, whitespace runs and characters outside the vocabulary."""
    rng, tok = random.Random(seed), oracle(tiny_a).tok
    pieces = [t.replace("\u2581", " ") for t in tok.tokens]
    chars = [chr(c) for c in (9, 10, 32, 0x41, 0xE9, 0x301, 0x200D, 0x4E2D, 0x1F600, 0x10FFFF)]
    text = "".join(rng.choice([rng.choice(pieces), rng.choice(chars), " the clerk"]) for _ in range(4000))
    for special in (False, True):
        assert tokenize(keel, tiny_a, text, tmp_path, *(["--special"] if special else [])) == tok.encode(text, special=special)


def test_long_text_is_not_quadratic(keel, tiny_a, oracle, tmp_path):
    text = "a" * 400_000 + " the colour of the sky is blue" * 10_000
    got = tokenize(keel, tiny_a, text, tmp_path)
    assert got == oracle(tiny_a).tok.encode(text)


@pytest.mark.parametrize("bad", [b"ok \xff", b"\xc0\x80", b"\xed\xa0\x80", b"abc\xe4\xb8", b"\xf4\x90\x80\x80"])
def test_invalid_utf8_is_refused(keel, tiny_a, tmp_path, bad):
    f = tmp_path / "bad.txt"
    f.write_bytes(bad)
    keel.fails("tokenize", "-m", tiny_a, "--json", "--file", f, says="utf-8")


def test_hf_folder(keel, tiny, oracle, tiny_a, tmp_path):
    for text in ("the sky", texts.ENGLISH, texts.MULTI):
        assert tokenize(keel, tiny / "tiny_a_hf", text, tmp_path) == oracle(tiny_a).tok.encode(text)


@pytest.mark.full
def test_real_model(keel, real, g270, tmp_path):
    for case in g270["tokenizer"]:
        if case["text"]:
            assert tokenize(keel, real, case["text"], tmp_path) == case["plain"], repr(case["text"])
            assert tokenize(keel, real, case["text"], tmp_path, "--special") == case["special"], repr(case["text"])


PROMPTS = ["what is this? <image>", "<image>", "<image><image>", "a <image>\n<image> b", "\n<image>\n\nthe clerk", "is  <image>  red?",
           "<start_of_turn>user\n<image>the sky", "no image, <image", "it's\n\n\n<image>\n\n\n noon"]


def expanded(tok, text, n):
    """What transformers' Gemma3Processor tokenises: every placeholder replaced by its full image sequence."""
    start, end = tok.id["<start_of_image>"], tok.id["<end_of_image>"]
    soft = tok.id.get("<image_soft_token>", 0)
    parts, ids = text.split("<image>"), [tok.bos]
    for i, part in enumerate(parts):
        ids += tok.encode(("\n\n" if i else "") + part + ("\n\n" if i + 1 < len(parts) else ""), bos=False)
        ids += [start] + [soft] * n + [end] if i + 1 < len(parts) else []
    return ids


@pytest.mark.parametrize("n", [1, 5])
def test_images(keel, tiny_a, oracle, tmp_path, n):
    tok = oracle(tiny_a).tok
    for text in PROMPTS:
        got = tokenize(keel, tiny_a, text, tmp_path, "--image-tokens", n)
        assert got == expanded(tok, text, n), repr(text)
        assert tokenize(keel, tiny_a, text, tmp_path) == tok.encode(text)  # without the option it is text


def test_images_as_the_processor(keel, tiny, tiny_a, tmp_path):
    """The ids of transformers' own Gemma3Processor, with the tokenizer.json of the same vocabulary."""
    np, transformers = pytest.importorskip("numpy"), pytest.importorskip("transformers")
    pytest.importorskip("PIL", reason="Pillow is missing; tests/README.md says how to make the environment")
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny / "tiny_a_hf/tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"})
    processor = transformers.Gemma3Processor(image_processor=transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28}),
                                             tokenizer=tok, image_seq_length=3)
    for text in PROMPTS:
        n = text.count("<image>")
        if "<start_of_turn>" in text:
            continue  # a control token written in a text is one to transformers and plain text to keel
        out = processor(text=text.replace("<image>", "<start_of_image>"), images=[np.zeros((28, 28, 3), np.uint8)] * n or None)
        want = [0 if i == tok.image_token_id else int(i) for i in np.array(out["input_ids"][0])]
        assert tokenize(keel, tiny_a, text, tmp_path, "--image-tokens", 3) == want, repr(text)


@pytest.mark.full
def test_real_images(keel, real, oracle, tmp_path):
    """Gemma's own vocabulary, with its tokens for runs of up to 31 newlines."""
    tok = oracle(real).tok
    for text in PROMPTS + ["x" + "\n" * k + "<image>" + "\n" * (30 - k) + "y" for k in range(0, 31, 3)]:
        assert tokenize(keel, real, text, tmp_path, "--image-tokens", 256) == expanded(tok, text, 256), repr(text)


def test_images_do_not_go_with_special(keel, tiny_a):
    keel.fails("tokenize", "-m", tiny_a, "--image-tokens", 4, "--special", "<image>", says="--special", rc=2)
