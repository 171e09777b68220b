#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""drivers.py BUILD [--only NAME]: the op tests and `keel doctor --quick` (kernel variants, then the clerk end to end) on every Vulkan
driver and clamp profile at hand; prints one table and, last, "N passed, M failed".

Drivers: the system's lavapipe at vector widths 128, 256 and 512 (subgroups of 4, 8, 16), SwiftShader where Chromium is installed, with
KEEL_MESA_RUN a newer Mesa: a command that runs its arguments with that driver, such as "mesa-root ROOT run", and with --arm64 lavapipe on
that processor under qemu. Libraries that a newer Mesa's root lacks are handed over through LD_LIBRARY_PATH.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SWIFTSHADER = "/usr/lib/chromium/vk_swiftshader_icd.json"
WIDTHS = (128, 256, 512)
PROFILES = ("min", "rpi", "mali", "discrete")
SYSTEM_LIBS = re.compile(r"/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*|libvulkan)[.-]")


def rows():
    """(name, environment, command prefix, clamp profile); op tests walk through profiles themselves and run where that is empty."""
    lavapipe = sorted(map(str, Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json")))
    for w in WIDTHS if lavapipe else ():
        yield f"lavapipe {w}", {"VK_ICD_FILENAMES": lavapipe[0], "LP_NATIVE_VECTOR_WIDTH": str(w)}, [], ""
    newer = shlex.split(os.environ.get("KEEL_MESA_RUN", ""))
    for w in WIDTHS if newer else ():
        yield f"newer lavapipe {w}", {"LP_NATIVE_VECTOR_WIDTH": str(w)}, newer, ""
    if Path(SWIFTSHADER).is_file():
        yield "SwiftShader", {"VK_ICD_FILENAMES": SWIFTSHADER}, [], ""
    for p in PROFILES if lavapipe else ():
        yield f"lavapipe as {p}", {"VK_ICD_FILENAMES": lavapipe[0]}, [], p


def libraries(programs, folder):
    """Copies what the programs link, but for what belongs to a system's own loader, into a folder."""
    for program in programs:
        for path in re.findall(r"=> (/\S+)", subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout):
            if not SYSTEM_LIBS.search(path):
                shutil.copy(path, folder)


def run(argv, env, prefix, cwd):
    start = time.time()
    p = subprocess.run([*prefix, *map(str, argv)], env={**os.environ, **env}, cwd=cwd, capture_output=True, text=True, errors="replace")
    return p, time.time() - start


def arm64(args):
    """The row of an arm64 build: op tests alone, of the large grids one case in eight: under qemu a pipeline takes seconds to compile."""
    root, build = args.arm64
    icd = next((root / "usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    with tempfile.TemporaryDirectory() as cache:
        env = {"VK_ICD_FILENAMES": f"/{icd.relative_to(root)}", "XDG_CACHE_HOME": cache, "KEEL_TEST_EVERY": "8"}
        return op_tests(build.resolve(), env, ["qemu-aarch64-static", "-L", root.resolve()])


def op_tests(build, env, prefix):
    """Names of the op tests that failed; a test without a device (77) counts as failed here."""
    bad, n, seconds = [], 0, 0
    for program in sorted((build / "tests").glob("op_*")):
        if program.is_file() and os.access(program, os.X_OK):
            p, s = run([program], {**env, "KEEL_TEST_PROFILES": "none"}, prefix, build / "tests")
            n, seconds = n + 1, seconds + s
            if p.returncode != 0:
                bad.append(program.name)
                sys.stderr.write((p.stdout + p.stderr)[-2000:])
    return bad, n, seconds


def doctor(build, env, prefix, profile):
    argv = [build / "src/cli/keel", "doctor", "--quick", "--json", "-q", *(["--caps", profile] if profile else [])]
    with tempfile.TemporaryDirectory() as cache:
        p, s = run(argv, {**env, "XDG_CACHE_HOME": cache}, prefix, build)
    try:
        return p.returncode, json.loads(p.stdout), s
    except json.JSONDecodeError:
        sys.stderr.write(p.stderr[-2000:])
        return 1, None, s


def describe(j):
    if j is None:
        return "no report"
    wrong = [f"{r['family']} {r['variant']}" for r in j["rows"] if not r["right"]]
    w = j["whole"]
    text = f"{len(j['rows'])} variants" + (f", wrong: {', '.join(wrong)}" if wrong else "")
    return text + (f"; clerk {w['worst']:.1e} nats, step {w['loss_before'] - w['loss_after']:.5f}" if w else "; no clerk")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("build", type=Path)
    a.add_argument("--only", default="", help="rows whose name holds this")
    a.add_argument("--no-ops", action="store_true", help="the doctor alone")
    a.add_argument("--arm64", type=Path, nargs=2, metavar=("SYSROOT", "BUILD"), help="also under qemu (docs/cross-building.md)")
    args = a.parse_args()
    build = args.build.resolve()
    passed = failed = 0
    with tempfile.TemporaryDirectory() as libs:
        libraries([build / "src/cli/keel", build / "tests/op_norm"], libs)
        print(f"{'driver':<22} {'op tests':<14} {'doctor':<7} {'seconds':>7}  details")
        for name, env, prefix, profile in rows():
            if args.only not in name:
                continue
            env = {**env, "LD_LIBRARY_PATH": libs} if prefix else env
            bad, n, seconds = op_tests(build, env, prefix) if not profile and not args.no_ops else ([], 0, 0)
            rc, j, s = doctor(build, env, prefix, profile)
            passed, failed = passed + n - len(bad) + (rc == 0), failed + len(bad) + (rc != 0)
            print(f"{name:<22} {f'{n - len(bad)}/{n}' if n else '-':<14} {'right' if rc == 0 else 'WRONG':<7} {seconds + s:7.0f}  "
                  f"{describe(j)}{'; failed: ' + ' '.join(bad) if bad else ''}", flush=True)
        if args.arm64 and args.only in "arm64 lavapipe":
            bad, n, seconds = arm64(args)
            passed, failed = passed + n - len(bad), failed + len(bad)
            print(f"{'arm64 lavapipe':<22} {f'{n - len(bad)}/{n}':<14} {'-':<7} {seconds:7.0f}  under qemu"
                  f"{'; failed: ' + ' '.join(bad) if bad else ''}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or passed == 0 else 0


sys.exit(main())
