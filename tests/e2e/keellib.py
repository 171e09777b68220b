# SPDX-License-Identifier: MIT
"""keellib: libkeel.so through ctypes, for what no command offers: here, the soft tokens of an image."""
import ctypes as C
import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LOG = C.CFUNCTYPE(None, C.c_void_p, C.c_int, C.c_char_p)


class Log(C.Structure):
    _fields_ = [("level", C.c_int), ("write", LOG), ("user", C.c_void_p)]


class VisionInfo(C.Structure):
    _fields_ = [("path", C.c_char * 4096)] + [(n, C.c_uint32) for n in ("image_size", "patch", "width", "ff_width", "n_layers",
                "n_heads", "n_tokens", "out_width")] + [("eps", C.c_float)] + [(n, C.c_uint64) for n in ("n_params", "file_bytes", "hash")]


class Error(Exception):
    """What the library logged."""


class Lib:
    """The library and its first device. `messages` holds what was logged since the last call."""

    def __init__(self):
        path = Path(os.environ.get("KEEL_LIB", ROOT / "build/src/libkeel.so"))
        self.c = C.CDLL(str(path))
        self.c.keel_vision_info.restype = C.POINTER(VisionInfo)
        self.messages = []
        self.write = LOG(lambda user, level, text: self.messages.append(text.decode()))
        self.log = Log(3, self.write, None)
        self.dev = C.c_void_p()
        self.call("keel_device_create", C.byref(self.dev), None, C.byref(self.log))

    def call(self, name, *args):
        self.messages.clear()
        if getattr(self.c, name)(*args) != 0:
            raise Error("\n".join(self.messages))

    def vision(self, path):
        return Vision(self, path)


class Vision:
    def __init__(self, lib, path):
        self.lib, self.p = lib, C.c_void_p()
        lib.call("keel_vision_open", C.byref(self.p), str(path).encode(), None, C.byref(lib.log))
        self.info = lib.c.keel_vision_info(self.p).contents

    def encode(self, image, device=True, view=0):
        out = np.full((self.info.n_tokens, self.info.out_width), np.nan, np.float32)
        self.lib.call("keel_vision_encode", self.p, self.lib.dev if device else None, str(image).encode(), C.c_uint32(view),
                      out.ctypes.data_as(C.c_void_p))
        return out

    def unload(self):
        self.lib.c.keel_vision_unload(self.p)

    def close(self):
        self.lib.c.keel_vision_close(C.byref(self.p))
