# SPDX-License-Identifier: MIT
"""Images in crops (--pan-and-scan) against transformers' Gemma3ImageProcessor, Gemma3Processor and Gemma3ForConditionalGeneration."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keelcli import generate, read_log, score, train_args, write_rows
from test_images import make_pair  # noqa: F401 (a fixture)

Image = pytest.importorskip("PIL.Image", reason="Pillow is missing; tests/README.md says how to make the environment")

# Crops of each size by Gemma3ImageProcessor: wide and tall, cut unevenly, below and just above the ratio, crops that would be too
# narrow, more crops than four.
SIZES = {(600, 256): 2, (1001, 333): 3, (256, 900): 3, (300, 1100): 4, (2000, 300): 4, (300, 280): 0, (520, 430): 2, (308, 256): 0,
         (640, 200): 0, (307, 600): 2}
# Eight-bit pixels differ by one where a resize rounds otherwise.
TOL = 0.05


def processor(shape):
    """transformers' image processor on Pillow, which keel's resize follows."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
    made = Gemma3ImageProcessorPil(size={"height": shape.image, "width": shape.image}, image_mean=list(shape.mean), image_std=list(shape.std))
    options = {k: v for k, v in Gemma3Processor.images_kwargs.items() if k.startswith("pan_and_scan")}
    return lambda file: made(Image.open(file), do_pan_and_scan=True, return_tensors="np", **options)


def expand(text, crops):
    """A text with <image> placeholders as Gemma3Processor expands it; every view is <image> again."""
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
    head, *rest = text.split("<image>")
    view = SimpleNamespace(full_image_sequence="<image>")
    for n, part in zip(crops, rest, strict=True):
        head += Gemma3Processor.replace_image_token(view, {"num_crops": [n]}, 0) + part
    return head


class Crops:
    """The oracle: prompts expanded, pixels of all views from transformers' processor."""

    def __init__(self, vlm, folder):
        self.vlm, self.folder, self.made = vlm, folder, {}
        self.process = processor(vlm.shape)

    def view(self, name):
        if name not in self.made:
            out = self.process(self.folder / name)
            self.made[name] = (int(np.ravel(out["num_crops"])[0]), np.asarray(out["pixel_values"], np.float32))
        return self.made[name]

    def prompt(self, text, names):
        return self.vlm.encode([self.vlm.tok.bos, *self.vlm.pieces(expand(text, [self.view(n)[0] for n in names]))])

    @torch.no_grad()
    def logprobs(self, ids, names):
        t = torch.tensor([ids])
        logits = self.vlm.model(input_ids=t, use_cache=False, token_type_ids=(t == self.vlm.soft).long(),
                                pixel_values=torch.from_numpy(np.concatenate([self.view(n)[1] for n in names]))).logits[0]
        lp = torch.log_softmax(logits[:-1].double(), -1)
        return lp.gather(1, t[0, 1:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def setup(make_pair):  # noqa: F811
    model, mmproj, vlm, folder = make_pair("tiny_a")
    for w, h in SIZES:
        Image.fromarray(noise(w, h)).save(folder / f"{w}x{h}.png")
    return model, mmproj, Crops(vlm, folder), folder


def noise(w, h):
    """Blobs that differ from crop to crop and survive being made small."""
    rng = np.random.default_rng(w * 10000 + h)
    small = Image.fromarray(rng.integers(0, 256, (h // 40 + 2, w // 40 + 2, 3), np.uint8))
    return np.asarray(small.resize((w, h), Image.BICUBIC))


def rows_of(sizes):
    return [{"id": f"{w}x{h}", "prompt": "the clerk <image> counts", "completion": " the red stones", "images": [f"{w}x{h}.png"]}
            for w, h in sizes]


def test_crops_and_log_probabilities(keel, setup):
    model, mmproj, oracle, folder = setup
    rows = rows_of(SIZES) + [{"id": "two", "prompt": "<image>is the sky, and <image>", "completion": " green",
                              "images": ["600x256.png", "300x280.png"]}]
    got = score(keel, model, rows, folder, "--mmproj", mmproj, "--pan-and-scan")
    whole = score(keel, model, rows, folder, "--mmproj", mmproj)
    worst = 0
    for row, g, plain in zip(rows, got, whole, strict=True):
        ids = oracle.prompt(row["prompt"], row["images"])
        n = [oracle.view(f)[0] for f in row["images"]]
        assert row["id"] == "two" or n == [SIZES[tuple(map(int, row["id"].split("x")))]]
        want = oracle.logprobs(ids + g["token_ids"], row["images"])[len(ids) - 1:]
        worst = max(worst, np.abs(np.array(g["token_logprobs"]) - want).max())
        assert (plain["token_logprobs"] == g["token_logprobs"]) == (max(n) == 0), row["id"]
    print("largest difference of log-probabilities", worst)
    assert worst < TOL


def test_prompt_ids(keel, setup):
    """Ids as transformers makes them: as many, in a plain prompt and in a turn; the words are tokenised with the text around."""
    model, mmproj, oracle, folder = setup
    name = "1001x333.png"
    _, j = generate(keel, model, "look: <image>\nwell", 1, "--greedy", "--mmproj", mmproj, "--pan-and-scan", "--image", folder / name)
    assert j["prompt_tokens"] == len(oracle.prompt("look: <image>\nwell", [name]))
    _, j = generate(keel, model, "well?", 1, "--greedy", "--chat", "--mmproj", mmproj, "--pan-and-scan", "--image", folder / name)
    text = expand("<image>well?", [oracle.view(name)[0]])
    assert j["prompt_tokens"] == len(oracle.vlm.row({"messages": [{"role": "user", "content": text}]}, open_=True)[0])


@pytest.mark.parametrize("targets", ["all", "all,vision.*"])
def test_train(keel, setup, targets):
    """The first loss is the oracle's; a state made with crops is not continued without them."""
    model, mmproj, oracle, folder = setup
    row = {k: v for k, v in rows_of([(600, 256)])[0].items() if k != "id"}
    data = write_rows(folder / "crops.jsonl", [row])
    out = folder / f"crops{len(targets)}.gguf"
    args = [*train_args(model, data, out, mmproj=mmproj, rank=2, batch=1, targets=targets, log=folder / "crops.log"), "--save-every", 1]
    keel(*args, "--steps", 2, "--pan-and-scan", "--resume", folder / f"crops{len(targets)}.state")
    ids = oracle.prompt(row["prompt"], row["images"])
    c = oracle.vlm.tok.encode(row["completion"], bos=False)
    want = -oracle.logprobs(ids + c, row["images"])[len(ids) - 1:].mean()
    losses = [r["loss"] for r in read_log(folder / "crops.log")]
    assert abs(losses[0] - want) < TOL and losses[1] < losses[0]
    keel.fails(*args, "--steps", 3, "--resume", folder / f"crops{len(targets)}.state", says="images hash")


def test_bad_use(keel, setup):
    model, mmproj, _, folder = setup
    keel.fails("run", "-m", model, "-p", "a", "-n", 1, "--pan-and-scan", says=["--pan-and-scan", "--mmproj"])
    (folder / "none.png").write_text("no image")
    data = write_rows(folder / "bad.jsonl", [{"prompt": "<image>", "completion": "a", "images": ["none.png"]}])
    keel.fails("score", "-m", model, "--mmproj", mmproj, "--pan-and-scan", "--data", data, "--out", folder / "never.jsonl",
               says=["bad.jsonl:1", "none.png"], leaves=folder)
