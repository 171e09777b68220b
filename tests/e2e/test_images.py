# SPDX-License-Identifier: MIT
"""score, run and train with images against Gemma3ForConditionalGeneration and peft in fp32, from the pixels on; bad input."""
import dataclasses
import json
import subprocess

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import lora
import texts
import tiny_vision
from keelcli import generate, read_log, read_rows, score, train, train_args, write_rows

Image = pytest.importorskip("PIL.Image", reason="Pillow is missing; tests/README.md says how to make the environment")

# fp32 on both sides and no resize: what differs is summation order, through tower, projector and up to seven blocks.
TOL = 1e-3
# Text model and the tower made for its width. Windows are 16, 9 and 8 tokens; an image of the last is 25.
PAIRS = {"tiny_a": "vis_a", "tiny_c": "vis_b", "tiny_d": "vis_c"}


@pytest.fixture(scope="module", params=list(PAIRS))
def pair(request, make_pair):
    return make_pair(request.param)


@pytest.fixture(scope="module")
def make_pair(tiny, oracle, tmp_path_factory):
    """name -> (model, mmproj, Vlm, folder with images p0.png ... of the tower's own size)."""
    from gemma3_vlm import Vlm
    made = {}

    def make(name):
        if name not in made:
            folder, s = tmp_path_factory.mktemp(name), tiny_vision.SHAPES[PAIRS[name]]
            parts = tiny_vision.make(s)
            tiny_vision.write_mmproj(folder / "mmproj.gguf", s, *parts)
            for i in range(4):
                Image.fromarray(tiny_vision.picture(s.image, s.image, i)).save(folder / f"p{i}.png")
            made[name] = (tiny / f"{name}.gguf", folder / "mmproj.gguf", Vlm(oracle(tiny / f"{name}.gguf"), s, *parts), folder)
        return made[name]
    return make


def parts(*items):
    """A content in parts: texts, and numbers of images."""
    return [{"type": "text", "text": i} if isinstance(i, str) else {"type": "image", "image": f"p{i}.png"} for i in items]


ROWS = [
    {"id": "first", "prompt": "<image>what is the colour of", "completion": " the sky? the sky is blue", "images": ["p0.png"]},
    {"id": "middle", "prompt": "the clerk <image>\n counts the red stones", "completion": " and the blue stones, and then",
     "images": ["p1.png"]},
    {"id": "last", "prompt": "is a stone red or blue;\n\n<image>", "completion": "it is green!", "images": ["p2.png"]},
    {"id": "two", "prompt": "<image> is the sky, and the\n<image> grass is", "completion": " green. It's noon.",
     "images": ["p3.png", "p0.png"]},
    {"id": "text", "prompt": "the number in", "completion": " the book. a stone is red or blue"},
    {"id": "touching", "prompt": "<image><image>", "completion": " the book", "images": ["p1.png", "p1.png"]},
    {"id": "chat", "messages": [{"role": "user", "content": "  <image>is it green? "}], "completion": "it is red", "images": ["p2.png"]},
    {"id": "parts", "messages": [{"role": "user", "content": parts(0, " what is it? ", 3, "and <image>")},
                                 {"role": "assistant", "content": "a stone"}, {"role": "user", "content": parts("the sky", 1)}],
     "completion": "it is blue"},
]


def files(folder, names):
    return [folder / n for n in names]


def run_score(keel, pair, rows, *options):
    model, mmproj, _, folder = pair
    return score(keel, model, rows, folder, "--mmproj", mmproj, *options)


def check(pair, rows, got, tol=TOL):
    _, _, vlm, folder = pair
    worst = 0
    for row, g in zip(rows, got, strict=True):
        prompt, _, names = vlm.row(row, open_=True)
        c = vlm.tok.encode(row["completion"], bos=False)
        want = vlm.logprobs(prompt + c, files(folder, names))[len(prompt) - 1:]
        assert g["id"] == row["id"] and g["token_ids"] == c
        worst = max(worst, np.abs(np.array(g["token_logprobs"]) - want).max())
        assert worst < tol, (row["id"], g["token_logprobs"], want)
    print("largest difference of log-probabilities", worst)


def test_score(keel, pair):
    check(pair, ROWS, run_score(keel, pair, ROWS))


def test_score_in_parts(keel, make_pair):
    """Rows of up to 90 tokens in passes of 27: images of 25 are never cut; windows of 8 and ring caches."""
    pair = make_pair("tiny_d")
    rows = [{"id": k, "prompt": "the clerk counts the red stones <image> and the blue stones, and then the <image>\n is blue. " * k,
             "completion": texts.ENGLISH[:40], "images": ["p0.png", "p1.png"] * k} for k in (1, 2)]
    check(pair, rows, run_score(keel, pair, rows, "--batch-tokens", 27))


def test_score_with_an_adapter(keel, make_pair, tmp_path):
    pair = make_pair("tiny_a")
    model, _, vlm, _ = pair
    adapter = lora.random_adapter(vlm.ref.config, 3, 5, b_std=0.05)
    lora.write_gguf(tmp_path / "a.gguf", adapter, 6)
    got = run_score(keel, pair, ROWS, "--lora", tmp_path / "a.gguf")
    with lora.attached(vlm.ref, adapter, 6):
        check(pair, ROWS, got)


def test_images_matter_and_rows_do_not_mix(keel, make_pair):
    pair = make_pair("tiny_a")
    other = [{**ROWS[0], "images": ["p1.png"]}, ROWS[0]]
    a, b = run_score(keel, pair, other)
    assert abs(a["logprob"] - b["logprob"]) > 1e-3
    alone = run_score(keel, pair, ROWS[3:4])[0]
    packed = run_score(keel, pair, ROWS)[3]
    assert np.abs(np.subtract(alone["token_logprobs"], packed["token_logprobs"])).max() < 1e-4


@pytest.mark.parametrize("part", [{"image_url": {"url": "p3.png"}, "type": "image_url"}, {"image_url": "p3.png", "type": "image_url"},
                                  {"type": "image", "url": "p3.png"}, {"type": "image", "path": "p3.png"}])
def test_forms_of_an_image_part(keel, make_pair, part):
    """OpenAI's and those of transformers' chat templates."""
    pair = make_pair(next(iter(PAIRS)))
    rows = [{"messages": [{"role": "user", "content": [p, {"type": "text", "text": " what is it?"}]}], "completion": "a stone"}
            for p in (part, *parts(3), *parts(0))]
    got = [r["logprob"] for r in run_score(keel, pair, rows)]
    assert got[0] == got[1] != got[2]


@pytest.mark.parametrize("batch", [256, 26])
def test_generate(keel, make_pair, batch):
    """Prefill with images in one pass or several, then the recorded step: greedy ids as the oracle's, up to a near tie."""
    model, mmproj, vlm, folder = make_pair("tiny_d")
    text = "the clerk counts <image> the red stones and <image> writes"
    images = files(folder, ["p0.png", "p2.png"])
    got, j = generate(keel, model, text, 12, "--greedy", "--mmproj", mmproj, "--image", images[0], "--image", images[1],
                      "--batch-tokens", batch)
    ids = vlm.encode([vlm.tok.bos, *vlm.pieces(text)])
    want, gaps = vlm.greedy(ids, images, 12)
    sure = next((i for i, g in enumerate(gaps) if g < 2e-3), len(gaps))
    assert j["prompt_tokens"] == len(ids) and sure >= 1 and got[:sure] == want[:sure], (got, want, gaps)


def test_generate_image_first(keel, make_pair):
    """Without a place in the text the images come before it, in a prompt and in the chat template."""
    model, mmproj, vlm, folder = make_pair("tiny_a")
    image = folder / "p1.png"
    for chat in (False, True):
        got, j = generate(keel, model, "is it red?", 1, "--greedy", "--mmproj", mmproj, "--image", image, *["--chat"] * chat)
        ids = vlm.encode([vlm.tok.bos, *vlm.pieces("<image>is it red?")])
        if chat:
            ids = vlm.row({"messages": [{"role": "user", "content": "<image>is it red?"}]}, open_=True)[0]
        want, _ = vlm.greedy(ids, [image], 1)
        assert j["prompt_tokens"] == len(ids) and (got == want or want[0] in (vlm.tok.eos, vlm.tok.eot))


def test_chat_turns(keel, make_pair):
    """An image with the first turn, one with a later turn by /image, a file that is none and /image alone in between."""
    model, mmproj, vlm, folder = make_pair("tiny_a")
    (folder / "no.png").write_text("no image")
    lines = f"what is it?\n/image {folder}/no.png\n/image\n/image  \n/image  {folder}/p2.png \nand this?\n"
    r = subprocess.run(keel.argv("run", "-m", model, "--mmproj", mmproj, "--image", folder / "p0.png", "--json", "--greedy", "-n", 4),
                       input=lines.encode(), capture_output=True, env=keel.env, timeout=keel.timeout)
    assert r.returncode == 0, r.stderr
    first, second = [json.loads(x) for x in r.stdout.decode().splitlines()]
    assert "no.png" in r.stderr.decode() and r.stderr.decode().count("/image without a file") == 2
    tok = vlm.tok
    ids = vlm.row({"messages": [{"role": "user", "content": "<image>what is it?"}]}, open_=True)[0]
    assert first["prompt_tokens"] == len(ids)
    ids += first["ids"]
    whole = ids + [tok.eot] + tok.encode("\n", bos=False)
    whole += vlm.row({"messages": [{"role": "user", "content": "<image>and this?"}]}, open_=True)[0][1:]
    want, gaps = vlm.greedy(whole, files(folder, ["p0.png", "p2.png"]), 4)
    sure = next((i for i, g in enumerate(gaps) if g < 2e-3), len(gaps))
    end = (tok.eos, tok.eot)
    assert second["ids"][:sure] == [i for i in want[:sure] if i not in end], (second, want, gaps)


@pytest.mark.parametrize("name, kind, tol", [("tiny_a", "F32", 4e-3), ("tiny_d", "F32", 4e-3), ("tiny_d", "Q8_0", 0.05)])
def test_llama_cpp_agrees_on_answers(keel, make_pair, tmp_path, name, kind, tol):
    """The same two files in llama.cpp's mtmd, log-probs of the answers. Looser than transformers: llama.cpp takes GELU from a table of
    halves, and rounds activations to 8 bits before Q8_0 matrices. Images of tiny_d are longer than its window."""
    pytest.importorskip("llama_cpp")
    import mtmd_ref
    model, _, vlm, folder = make_pair(name)
    mmproj, s = tmp_path / "mmproj.gguf", dataclasses.replace(tiny_vision.SHAPES[PAIRS[name]], type=GGMLQuantizationType[kind])
    tiny_vision.write_mmproj(mmproj, s, *tiny_vision.make(s))
    rows = [r for r in ROWS if r.get("images") and "prompt" in r]
    worst = 0
    for row, g in zip(rows, run_score(keel, (model, mmproj, vlm, folder), rows), strict=True):
        rgbs = [np.asarray(Image.open(f)) for f in files(folder, row["images"])]
        n, want = mtmd_ref.logprobs(model, mmproj, rgbs, row["prompt"], g["token_ids"])
        assert n == len(vlm.row(row, open_=True)[0]), row["id"]
        worst = max(worst, np.abs(np.subtract(g["token_logprobs"], want)).max())
    print(f"{name} {kind}: largest difference of log-probabilities from llama.cpp {worst:.2e}")
    assert worst < tol


# --- training ------------------------------------------------------------------------------------

TRAIN = {
    "image": [{k: v for k, v in r.items() if k != "id"} for r in ROWS[:4]],
    "mixed": [ROWS[3], texts.TRAIN[0], {**ROWS[2], "eos": True}, texts.CHAT[1],
              {"messages": ROWS[7]["messages"] + [{"role": "assistant", "content": "it is blue"}]}, texts.TRAIN[1]],
    "text": texts.TRAIN[:4],
}


def run_train(keel, pair, rows, **o):
    model, mmproj, vlm, folder = pair
    init = lora.random_adapter(vlm.ref.config, 4, 3, b_std=0.05)
    lora.write_gguf(folder / "init.gguf", init, 8)
    out, log = train(keel, model, rows, folder, mmproj=mmproj, init_adapter=folder / "init.gguf", rank=4, alpha=8, **o)
    return init, lora.read_gguf(out)[0], log


def oracle_train(pair, init, steps, lrs):
    _, _, vlm, folder = pair

    def loss_of(_, rows):
        return vlm.step_loss(_, [with_folder(r, folder) for r in rows])
    return lora.train(vlm.ref, init, 8, steps, lrs, loss_of=loss_of)


def with_folder(row, folder):
    """The row with absolute paths, for the oracle."""
    row = json.loads(json.dumps(row))
    if "images" in row:
        row["images"] = [str(folder / f) for f in row["images"]]
    for m in row.get("messages", ()):
        for p in m["content"] if isinstance(m["content"], list) else ():
            if "image" in p:
                p["image"] = str(folder / p["image"])
    return row


@pytest.mark.parametrize("kind", list(TRAIN))
def test_train_losses(keel, make_pair, kind):
    pair = make_pair("tiny_d" if kind == "image" else "tiny_a")
    rows = TRAIN[kind]
    init, _, log = run_train(keel, pair, rows, batch=2, steps=len(rows) // 2, lr=1e-3)
    want = oracle_train(pair, init, [rows[i:i + 2] for i in range(0, len(rows), 2)], [r["lr"] for r in log])
    for r, loss, norm in zip(log, want["loss"], want["grad_norm"], strict=True):
        print(kind, r["loss"] / loss - 1, r["grad_norm"] / norm - 1)
        assert abs(r["loss"] / loss - 1) < 1e-3 and abs(r["grad_norm"] / norm - 1) < 3e-3, (r, loss, norm)


def test_train_gradients_per_tensor(keel, pair):
    """As test_train.py: one AdamW step with eps = lr = 1 moves a weight by u = g / (|g| + 1)."""
    rows = TRAIN["mixed"]
    init, got, _ = run_train(keel, pair, rows, lr=1, eps=1, batch=len(rows), steps=1)
    want = oracle_train(pair, init, [rows], [1.0])["grads"]
    for k in want:
        for h, half in enumerate("ab"):
            u = init[k][h].astype(np.float64) - got[k][h]
            g = u / (1 - np.abs(u))
            err = np.linalg.norm(g - want[k][h])
            assert err < 2e-3 * np.linalg.norm(want[k][h]) + 3e-8 * g.size ** 0.5, (k, half, err, np.linalg.norm(want[k][h]))


def test_train_again_from_the_cache_and_resume(keel, make_pair):
    """Images from the disk cache give the same bits; another picture under the same name is another run."""
    model, mmproj, _, folder = make_pair("tiny_a")
    data = write_rows(folder / "r.jsonl", TRAIN["mixed"][:2])
    run = lambda out, **o: keel(*train_args(model, data, folder / out, mmproj=mmproj, rank=2, batch=2, log=folder / (out + ".log"), **o))
    run("x.gguf", steps=2)
    run("y.gguf", steps=2)
    assert (folder / "x.gguf").read_bytes() == (folder / "y.gguf").read_bytes()
    run("z.gguf", steps=1, resume=folder / "z.state")
    run("z.gguf", steps=2, resume=folder / "z.state")
    assert (folder / "z.gguf").read_bytes() == (folder / "x.gguf").read_bytes()
    assert [r["loss"] for r in read_log(folder / "z.gguf.log")] == [r["loss"] for r in read_log(folder / "x.gguf.log")]
    old = (folder / "p3.png").read_bytes()
    (folder / "p3.png").write_bytes((folder / "p1.png").read_bytes())
    try:
        keel.fails(*train_args(model, data, folder / "z.gguf", mmproj=mmproj, rank=2, batch=2, steps=3, resume=folder / "z.state"),
                   says="images hash")
    finally:
        (folder / "p3.png").write_bytes(old)


def test_exif_orientation_is_noted_once(keel, make_pair):
    """The pixels are taken as they are, and a line says so: once an image, also when its tokens come from the cache."""
    model, mmproj, vlm, folder = make_pair("tiny_a")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "p0.png").save(folder / "turned.png", exif=exif)
    rows = [{"prompt": f"<image> {i}", "completion": " the book", "images": [name]}
            for i, name in enumerate(("turned.png", "p1.png", "turned.png"))]
    same = [dict(r, images=[n.replace("turned", "p0") for n in r["images"]]) for r in rows]
    data = write_rows(folder / "exif.jsonl", rows)
    for _ in range(2):
        r = keel("score", "-m", model, "--mmproj", mmproj, "--data", data, "--out", folder / "exif.out")
        lines = [l for l in r.err.splitlines() if "EXIF" in l]
        assert len(lines) == 1 and "turned.png" in lines[0] and "orientation 6" in lines[0], r.err
    got = [r["token_logprobs"] for r in read_rows(folder / "exif.out")]
    assert got == [r["token_logprobs"] for r in run_score(keel, (model, mmproj, vlm, folder), same)]
    assert "EXIF" not in keel("score", "-m", model, "--mmproj", mmproj, "--data", data, "--out", folder / "exif.out", "-q").err


def test_info(keel, make_pair):
    """The tower beside its model: what it is, its memory, and room for image tokens in both plans."""
    model, mmproj, vlm, _ = make_pair("tiny_a")
    plain, j = (keel("info", model, *o, "--rank", 4, "--json").json for o in ((), ("--mmproj", mmproj)))
    assert j["vision"]["n_tokens"] == vlm.n_soft and j["vision"]["plan_vision"] and "vision" not in plain
    for plan in ("plan_run", "plan_train"):
        assert "image tokens" not in json.dumps(plain[plan]) and "image tokens" in json.dumps(j[plan])
    out = keel("info", model, "--mmproj", mmproj).out
    assert f"{vlm.n_soft} tokens of width 96" in out and "image tokens" in out
    keel.fails("info", model, "--mmproj", model, says=model.name)


# --- bad input -----------------------------------------------------------------------------------

ONE = {"prompt": "<image>", "completion": "a", "images": ["p0.png"]}
BAD_ROWS = [
    ({**ONE, "prompt": "<image> and <image>"}, ["in.jsonl:2", "place 2", "names 1"]),
    ({**ONE, "prompt": "no place"}, ["in.jsonl:2", "names 1", "0 places"]),
    ({**ONE, "images": []}, ["in.jsonl:2", "names 0"]),
    ({**ONE, "images": ["missing.png"]}, ["in.jsonl:2", "missing.png"]),
    ({**ONE, "images": ["no.png"]}, ["no.png"]),
    ({**ONE, "images": ["https://example.org/a.png"]}, ["in.jsonl:2", "only paths of files"]),
    ({**ONE, "images": "p0.png"}, ["in.jsonl:2", "list of paths"]),
]


@pytest.mark.parametrize("row, says", BAD_ROWS, ids=[" ".join(s) for _, s in BAD_ROWS])
def test_bad_rows(keel, make_pair, row, says):
    model, mmproj, _, folder = make_pair("tiny_a")
    (folder / "no.png").write_text("no image")
    data = write_rows(folder / "in.jsonl", [ROWS[4], row])
    keel.fails("score", "-m", model, "--mmproj", mmproj, "--data", data, "--out", folder / "never.jsonl", says=says, leaves=folder)
    keel.fails(*train_args(model, data, folder / "never.gguf", mmproj=mmproj), says=says, leaves=folder)


def test_bad_use(keel, make_pair, tiny):
    model, mmproj, _, folder = make_pair("tiny_a")
    image, (_, other, _, _) = folder / "p0.png", make_pair("tiny_c")
    run = lambda *a, **k: keel.fails("run", "-m", model, "-n", 1, *a, **k)
    run("-p", "a", "--image", image, says="--mmproj", rc=2)
    run("-p", "<image> <image>", "--mmproj", mmproj, "--image", image, says=["2 places", "1 image is"])
    run("-p", "<image>", "--mmproj", mmproj, "--image", image, "--image", image, says=["1 place", "2 images are"])
    run("-p", "a", "--mmproj", mmproj, "--image", folder / "missing.png", says="missing.png")
    run("-p", "a", "--mmproj", other, "--image", image, says=["mmproj", "96", "72"])
    run("-p", "a", "--mmproj", model, "--image", image, says=model.name)
    run("-p", "a", "--mmproj", mmproj, "--image", image, "--batch-tokens", 3, says="--batch-tokens to at least 4")
    data = write_rows(folder / "in.jsonl", [ROWS[0]])
    keel.fails("score", "-m", model, "--data", data, "--out", folder / "never.jsonl", says=["in.jsonl:1", "--mmproj"], leaves=folder)
    keel.fails(*train_args(model, data, folder / "never.gguf"), says=["in.jsonl:1", "--mmproj"], leaves=folder)
