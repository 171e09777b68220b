#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Turns one compute shader into a C file, or a list of module names into the header that declares them or the table of all.

    build.py shader --glslang P --spirv-val P --include DIR --source F.comp --name N --out N.c --depfile N.d [DEFINE...]
    build.py absent --name N --out N.c
    build.py probe --glslang P --spirv-val P F.comp
    build.py header --out shaders.h NAME...
    build.py table --out shaders.c NAME...

The C file holds `const uint32_t keel_spv_N[]` and `const struct keel_shader keel_sh_N`. A warning of the compiler is an error. An absent
module, one that the compiler at hand cannot make, has no code. A probe exits 0 if the tools accept the shader.
"""
import argparse
import os
import subprocess
import sys
import tempfile


def run(argv, what):
    """Runs a tool; any complaint ends the build with what it said."""
    p = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if p.returncode != 0 or "WARNING" in p.stdout or "warning:" in p.stdout:
        sys.exit(f"{what}:\n{p.stdout}\n  command: {' '.join(argv)}")


def write_depfile(path, target, glslang_deps):
    """glslang names its own output as the target; ninja wants ours."""
    deps = open(glslang_deps).read().replace("\\\n", " ").split(": ", 1)[1] if os.path.exists(glslang_deps) else ""
    open(path, "w").write(f"{target}: {' '.join(deps.split())}\n")


def shader(a):
    with tempfile.TemporaryDirectory() as tmp:
        spv, deps = os.path.join(tmp, "out.spv"), os.path.join(tmp, "out.d")
        run([a.glslang, "--target-env", "vulkan1.1", "-S", "comp", f"-I{a.include}", *[f"-D{d}" for d in a.define],
             "--depfile", deps, "-o", spv, a.source], f"{a.source} as module {a.name}")
        run([a.spirv_val, "--target-env", "vulkan1.1", spv], f"{a.source} as module {a.name} (SPIR-V)")
        code = open(spv, "rb").read()
        write_depfile(a.depfile, a.out, deps)
    words = [int.from_bytes(code[i:i + 4], "little") for i in range(0, len(code), 4)]
    lines = [", ".join(f"0x{w:08x}" for w in words[i:i + 8]) for i in range(0, len(words), 8)]
    with open(a.out, "w") as f:
        f.write(f"// Made from {os.path.basename(a.source)} by shaders/build.py. Do not edit.\n#include \"shaders.h\"\n\n")
        f.write(f"static const uint32_t keel_spv_{a.name}[] = {{\n    " + ",\n    ".join(lines) + ",\n};\n\n")
        f.write(f"const struct keel_shader keel_sh_{a.name} = {{\"{a.name}\", keel_spv_{a.name}, {len(words)}}};\n")


def absent(a):
    with open(a.out, "w") as f:
        f.write("// Made by shaders/build.py. Do not edit.\n#include \"shaders.h\"\n\n")
        f.write(f"const struct keel_shader keel_sh_{a.name} = {{\"{a.name}\", NULL, 0}};\n")


def probe(a):
    with tempfile.TemporaryDirectory() as tmp:
        spv = os.path.join(tmp, "out.spv")
        run([a.glslang, "--target-env", "vulkan1.1", "-S", "comp", "-o", spv, a.source], a.source)
        run([a.spirv_val, "--target-env", "vulkan1.1", spv], a.source)


def header(a):
    with open(a.out, "w") as f:
        f.write("// Every shader module of keel. Made by shaders/build.py from the list in shaders/meson.build. Do not edit.\n")
        f.write("#ifndef KEEL_SHADERS_H\n#define KEEL_SHADERS_H\n\n#include \"device.h\"\n\n")
        for name in a.name:
            f.write(f"extern const struct keel_shader keel_sh_{name};\n")
        f.write("\nextern const struct keel_shader *const keel_sh_all[]; // ends with NULL\n\n#endif\n")


def table(a):
    with open(a.out, "w") as f:
        f.write("// Every shader module of keel. Made by shaders/build.py. Do not edit.\n#include \"shaders.h\"\n\n")
        f.write("const struct keel_shader *const keel_sh_all[] = {\n    " + ",\n    ".join(f"&keel_sh_{n}" for n in a.name) + ",\n    NULL,\n};\n")


def main():
    p = argparse.ArgumentParser()
    sub = p.add_subparsers(dest="command", required=True)
    s = sub.add_parser("shader")
    for opt in ("glslang", "spirv-val", "include", "source", "name", "out", "depfile"):
        s.add_argument("--" + opt, required=True)
    s.add_argument("define", nargs="*")
    s.set_defaults(do=shader)
    b = sub.add_parser("absent")
    b.add_argument("--name", required=True)
    b.add_argument("--out", required=True)
    b.set_defaults(do=absent)
    o = sub.add_parser("probe")
    o.add_argument("--glslang", required=True)
    o.add_argument("--spirv-val", required=True)
    o.add_argument("source")
    o.set_defaults(do=probe)
    h = sub.add_parser("header")
    h.add_argument("--out", required=True)
    h.add_argument("name", nargs="+")
    h.set_defaults(do=header)
    t = sub.add_parser("table")
    t.add_argument("--out", required=True)
    t.add_argument("name", nargs="+")
    t.set_defaults(do=table)
    a = p.parse_args()
    a.do(a)


main()
