#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""lint.py ROOT: rules that the compiler does not check. Prints FILE:LINE: reason; exit code 1 if there is any."""
import re
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])
CODE = {".c", ".h"}
SHADER = {".comp", ".glsl"}
RULES = [
    # (suffixes, where it is allowed, pattern, reason)
    (CODE | SHADER, (), r'#\s*include\s+["<][^">]*\.\./', "an include climbs out of its folder"),
    (CODE, ("src/device/", "tests/device/"), r"\b(Vk[A-Z]\w+|vk[A-Z]\w+|VK_[A-Z]\w+)\b", "a Vulkan name outside src/device"),
    (CODE, ("platform/", "src/cli/", "tests/"), r"\bgetenv\s*\(", "getenv outside platform/ and src/cli"),
    (CODE | SHADER, (), r"\b(TODO|FIXME|XXX)\b", "unfinished work"),
    (CODE | SHADER, (), r"\t", "a tab"),
    (CODE | SHADER, (), r"[ \r]+$", "space at the end of the line"),
]
# Messages and comments may name what they talk about.
STRIP = re.compile(r'"(?:[^"\\]|\\.)*"|//.*')


def main():
    bad = 0
    for top in ("src", "models", "platform", "shaders", "tests"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix not in CODE | SHADER:
                continue
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text(encoding="utf-8")
            lines = text.split("\n")
            if "SPDX-License-Identifier: MIT" not in "\n".join(lines[:2]):
                print(f"{name}:1: no SPDX header")
                bad += 1
            if path.suffix in CODE and not name.startswith("tests/") and len(lines) > 800:
                print(f"{name}:{len(lines)}: longer than 800 lines")
                bad += 1
            for number, line in enumerate(lines, 1):
                for suffixes, allowed, pattern, reason in RULES:
                    if path.suffix not in suffixes or name.startswith(tuple(allowed) or ("\0",)):
                        continue
                    plain = line if "include" in reason or "space" in reason or "tab" in reason or "unfinished" in reason else STRIP.sub("", line)
                    if re.search(pattern, plain):
                        print(f"{name}:{number}: {reason}")
                        bad += 1
    return 1 if bad else 0


sys.exit(main())
