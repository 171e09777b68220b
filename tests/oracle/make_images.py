# SPDX-License-Identifier: MIT
"""make_images: small image files of every kind keel reads, and what Pillow makes of them, for tests/formats_image.c.

    python make_images.py ../data/images        (needs Pillow; seeded, so the same bytes with the same Pillow)

NAME.ppm is NAME decoded and converted to RGB; NAME.WxH.ppm is that resized with BILINEAR.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(sys.argv[1])
W, H = 37, 23
SIZES = ((14, 14), (56, 56), (37, 9), (50, 23), (1, 1), (3, 60))


def picture():
    """A gradient, hard edges and a little noise, different in each channel."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[0:H, 0:W]
    rgb = np.stack([x * 255 / W, y * 255 / H, 128 + 100 * np.sin(x / 3) * np.cos(y / 4)], -1)
    rgb[5:12, 8:20] = (250, 20, 30)
    rgb[14:20, 25:30] = (0, 255, 255)
    return np.clip(rgb + rng.normal(0, 6, rgb.shape), 0, 255).astype(np.uint8)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    a = picture()
    rgb, grey = Image.fromarray(a), Image.fromarray(a[:, :, 0])
    rgba = Image.fromarray(np.dstack([a, a[:, ::-1, 1]]))
    files = {
        "rgb.png": (rgb, {}), "grey.png": (grey, {}), "one_bit.png": (grey.convert("1"), {}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}), "alpha.png": (rgba, {}),
        "grey_alpha.png": (rgba.convert("LA"), {}), "colour.jpg": (rgb, {"quality": 90}),
        "progressive.jpg": (rgb, {"quality": 90, "progressive": True}), "grey.jpg": (grey, {"quality": 90}),
        "rgb.bmp": (rgb, {}), "palette.bmp": (rgb.quantize(16), {}),
        "two_frames.gif": (rgb.quantize(32), {"save_all": True, "append_images": [rgb.rotate(180).quantize(32)]}),
    }
    for name, (image, options) in files.items():
        image.save(OUT / name, **options)
        Image.open(OUT / name).convert("RGB").save(OUT / f"{name}.ppm")
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "camera", 6  # maker, orientation: turned by a quarter
    for name in ("turned.jpg", "turned.png"):
        rgb.save(OUT / name, exif=exif)
    for w, h in SIZES:
        rgb.resize((w, h), Image.BILINEAR).save(OUT / f"rgb.png.{w}x{h}.ppm")
    # 16 bits: Pillow clips such greys at 255, keel keeps the upper 8 bits; they are those of grey.png.
    Image.fromarray(a[:, :, 0].astype(np.uint16) * 257).save(OUT / "grey16.png")
    (OUT / "grey16.png.ppm").write_bytes((OUT / "grey.png.ppm").read_bytes())


main()
