# SPDX-License-Identifier: MIT
"""Images to soft tokens: parity with transformers, the disk cache, files that are bad."""
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import keellib
import mtmd_ref
import tiny_models
import tiny_vision

Image = pytest.importorskip("PIL.Image", reason="Pillow is missing; tests/README.md says how to make the environment")

# Sums of up to 160 products in fp32 in another order, over up to 3 blocks: about 1e-6 relative a block, and softmax and two
# norms amplify by less than ten.
TIGHT = 1e-4
LOOSE = 0.02  # where Pillow resizes vertically first, pixels differ by 1 of 255 (src/formats/image.c)


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("vision-cache"))
    return keellib.Lib()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    out = tmp_path_factory.mktemp("towers")
    made = {}
    for name, s in tiny_vision.SHAPES.items():
        tower, projector = tiny_vision.make(s)
        tiny_vision.write_mmproj(out / f"{name}.gguf", s, tower, projector)
        made[name] = (s, tower, projector, out / f"{name}.gguf")
    return made


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", list(tiny_vision.SHAPES))
def test_parity(lib, towers, tmp_path, name):
    s, tower, projector, path = towers[name]
    v = lib.vision(path)
    assert (v.info.n_tokens, v.info.out_width) == (s.side ** 2, s.out)
    for w, h in ((s.image, s.image), (101, 67), (23, 90)):
        rgb = tiny_vision.picture(w, h)
        file = tmp_path / f"{w}x{h}.png"
        Image.fromarray(rgb).save(file)
        err = relative(v.encode(file), tiny_vision.encode(s, tower, projector, rgb))
        print(f"{name} {w}x{h}: {err:.2e}")
        assert err < (TIGHT if w == h else LOOSE), (name, w, h, err)
    v.close()


# llama.cpp looks GELU up in a table of halves, and rounds activations to 8 bits before a Q8_0 matrix.
@pytest.mark.parametrize("name,tol", [("vis_a", 1e-3), ("vis_c", 0.05)])
def test_llama_cpp_makes_the_same_tokens(lib, towers, tmp_path, name, tol):
    pytest.importorskip("llama_cpp")
    s, _, _, path = towers[name]
    tiny_models.write_gguf(tmp_path / "text.gguf", dataclasses.replace(tiny_models.SHAPES["tiny_a"], hidden=s.out))
    rgb = tiny_vision.picture(s.image, s.image, 5)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    v = lib.vision(path)
    err = relative(v.encode(tmp_path / "a.png"), mtmd_ref.encode(tmp_path / "text.gguf", path, rgb))
    print(f"{name}: {err:.2e}")
    assert err < tol
    v.close()


def test_cache(lib, towers, tmp_path):
    path = towers["vis_a"][3]
    file, other = tmp_path / "a.png", tmp_path / "a.bmp"
    Image.fromarray(tiny_vision.picture(40, 30, 7)).save(file)
    Image.fromarray(tiny_vision.picture(40, 30, 7)).save(other)
    folder = lambda: set((Path(os.environ["XDG_CACHE_HOME"]) / "keel/vision").glob("*"))
    v = lib.vision(path)
    with pytest.raises(keellib.Error, match="no device"):
        v.encode(file, device=False)
    before = folder()
    first = v.encode(file)
    (entry,) = folder() - before
    v.close()
    v = lib.vision(path)
    assert np.array_equal(v.encode(file, device=False), first), "from the cache, without a device"
    assert np.array_equal(v.encode(other, device=False), first), "the same pixels in another file"
    for damage in (lambda b: b[:-4], lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b"", lambda b: b"x" * len(b)):
        good = entry.read_bytes()
        entry.write_bytes(damage(good))
        with pytest.raises(keellib.Error, match="no device"):
            v.encode(file, device=False)
        assert np.array_equal(v.encode(file), first) and entry.read_bytes() == good
    v.unload()
    assert np.array_equal(v.encode(file), first)
    v.close()


def test_cache_that_cannot_be_written(lib, towers, tmp_path, monkeypatch):
    (tmp_path / "keel").mkdir()
    (tmp_path / "keel/vision").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "a.png"
    Image.fromarray(tiny_vision.picture(40, 30, 8)).save(file)
    v = lib.vision(towers["vis_a"][3])
    assert np.isfinite(v.encode(file)).all() and "cannot be written" in lib.messages[-1]
    assert np.isfinite(v.encode(file)).all() and not lib.messages, "one warning is enough"
    v.close()


def test_cache_is_bounded(lib, towers, tmp_path, monkeypatch):
    """Above KEEL_IMAGE_CACHE the longest unused go; 0 keeps none; what is no size is an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for i, f in enumerate(files):
        Image.fromarray(tiny_vision.picture(40, 30, 100 + i)).save(f)
    entries = lambda: {p: p.stat().st_size for p in (tmp_path / "keel/vision").glob("*")}

    def tower(limit):
        monkeypatch.setenv("KEEL_IMAGE_CACHE", str(limit))
        return lib.vision(towers["vis_a"][3])

    def kept(v):
        out = []
        for i, f in enumerate(files):
            try:
                v.encode(f, device=False)
                out.append(i)
            except keellib.Error:
                pass
        return out

    v = tower("1G")
    v.encode(files[0])
    (size,) = entries().values()
    for f in files[1:6]:
        v.encode(f)
    v.encode(files[0])  # of use again
    v.close()
    v = tower(6 * size)
    assert kept(v) == list(range(6))
    for i in (1, 2, 3, 4, 5, 0):  # from the cache: 0 is the one used last
        v.encode(files[i], device=False)
        time.sleep(0.02)  # file times have the resolution of the kernel's tick
    v.encode(files[6])  # the seventh: trimmed to nine tenths of six
    assert kept(v) == [0, 3, 4, 5, 6] and sum(entries().values()) <= 6 * size
    for f in files[7:]:
        v.encode(f)
        assert sum(entries().values()) <= 6 * size
    assert files.index(files[-1]) in kept(v)
    v.close()
    left = entries()
    v = tower(0)
    v.encode(files[0])
    assert kept(v) == [] and entries() == left, "neither read nor written"
    v.close()
    v = tower(size)
    v.encode(files[0])
    assert entries() == left, "an entry that could not stay is not written"
    v.close()
    with pytest.raises(keellib.Error, match="KEEL_IMAGE_CACHE=lots: not a size"):
        tower("lots")


ENCODE = """
import sys
sys.path.insert(0, sys.argv[1])
import keellib
v = keellib.Lib().vision(sys.argv[2])
for _ in range(6):
    for f in sys.argv[3:]:
        print(v.encode(f).tobytes().hex()[:4000])
"""


def test_cache_of_two_processes(lib, towers, tmp_path, monkeypatch):
    """Three processes write and trim one folder at once: each gets the right tokens, and no file stays that is not whole."""
    path, files = towers["vis_a"][3], [tmp_path / f"{i}.png" for i in range(5)]
    for i, f in enumerate(files):
        Image.fromarray(tiny_vision.picture(40, 30, 200 + i)).save(f)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("KEEL_IMAGE_CACHE", "0")
    v = lib.vision(path)
    want = [v.encode(f).tobytes().hex()[:4000] for f in files]
    size = v.info.n_tokens * v.info.out_width * 4 + 64
    v.close()
    monkeypatch.setenv("KEEL_IMAGE_CACHE", str(3 * size))
    argv = [sys.executable, "-c", ENCODE, str(Path(__file__).parent), str(path), *map(str, files)]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for p in running:
        out, _ = p.communicate(timeout=300)
        assert p.returncode == 0 and out.split() == want * 6
    entries = list((tmp_path / "keel/vision").iterdir())
    assert entries and all(p.suffix == ".tokens" for p in entries) and len({p.stat().st_size for p in entries}) == 1


@pytest.mark.parametrize("data,says", [
    (b"", "empty"), (b"no image at all", "it reads PNG, JPEG, BMP and GIF"),
])
def test_bad_images(lib, towers, tmp_path, data, says):
    file = tmp_path / "bad.png"
    file.write_bytes(data)
    v = lib.vision(towers["vis_a"][3])
    with pytest.raises(keellib.Error, match=says) as e:
        v.encode(file)
    assert "bad.png" in str(e.value) and len(str(e.value).splitlines()) == 1
    with pytest.raises(keellib.Error, match="missing.png"):
        v.encode(tmp_path / "missing.png")
    v.close()


def replace(name, array):
    return lambda w: {name: array}


@pytest.mark.parametrize("skip,edit,says", [
    (["clip.projector_type"], None, "projector_type"),
    (["clip.projector_type"], lambda w: w.add_string("clip.projector_type", "mlp"), "\"mlp\" is not supported"),
    (["clip.use_gelu"], None, "use_gelu"), (["clip.vision.image_mean"], None, "image_mean"),
    (["clip.vision.image_size"], lambda w: w.add_uint32("clip.vision.image_size", 0), "image_size"),
    (["clip.vision.patch_size"], lambda w: w.add_uint32("clip.vision.patch_size", 57), "patch"),
    (["clip.vision.attention.head_count"], lambda w: w.add_uint32("clip.vision.attention.head_count", 5), "does not split"),
    (["clip.vision.projector.scale_factor"], lambda w: w.add_uint32("clip.vision.projector.scale_factor", 9), "scale_factor"),
    (["v.post_ln.bias"], None, "\"v.post_ln.bias\" is missing"),
    (["v.blk.1.attn_out.weight"], None, "\"v.blk.1.attn_out.weight\" is missing"),
    ([], replace("v.position_embd.weight", np.zeros((9, 64), np.float32)), "v.position_embd.weight"),
    ([], replace("mm.input_projection.weight", np.zeros((96, 64), np.float32)), "mm.input_projection.weight"),
    ([], lambda w: w.add_tensor("v.extra", np.zeros(4, np.float32)), "\"v.extra\" is no part"),
])
def test_bad_towers(lib, towers, tmp_path, skip, edit, says):
    s, tower, projector, _ = towers["vis_a"]
    file = tmp_path / "bad.gguf"
    tiny_vision.write_mmproj(file, s, tower, projector, skip, edit)
    with pytest.raises(keellib.Error) as e:
        lib.vision(file)
    assert says in str(e.value) and "bad.gguf" in str(e.value) and len(str(e.value).splitlines()) == 1


def test_nan_in_a_tower(lib, towers, tmp_path):
    s, tower, projector, _ = towers["vis_a"]
    bad = np.ones((s.hidden,), np.float32)
    bad[3] = np.nan
    tiny_vision.write_mmproj(tmp_path / "nan.gguf", s, tower, projector, edit=replace("v.post_ln.weight", bad))
    Image.fromarray(tiny_vision.picture(56, 56, 9)).save(tmp_path / "a.png")
    v = lib.vision(tmp_path / "nan.gguf")
    with pytest.raises(keellib.Error, match="v.post_ln.weight.*NaN"):
        v.encode(tmp_path / "a.png")
    v.close()


def test_info(keel, towers):
    for s, _, _, path in towers.values():
        j = keel("info", path, "--json").json
        assert (j["image_size"], j["patch"], j["n_tokens"], j["out_width"]) == (s.image, s.patch, s.side ** 2, s.out)
        assert j["plan_vision"]["device_bytes"] > 0 and len(j["hash"]) == 16
        out = keel("info", path).out
        assert "vision tower" in out and f"{s.side ** 2} tokens" in out


def test_a_tower_is_no_model(keel, towers):
    keel.fails("tokenize", "-m", towers["vis_a"][3], "hello", says="--mmproj")
