# SPDX-License-Identifier: MIT
"""keelcli: how the end-to-end tests call keel. Every option's spelling that more than one test needs is here.

Environment: KEEL (program), KEEL_TEST_ARGS (device options for every command that computes, for example "--caps min" or
"--device swiftshader --validate"), KEEL_TEST_TIMEOUT (seconds a command may take; default 300,
1800 with --full).
"""
import json
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPUTING = {"score", "run", "perplexity", "train", "bench", "doctor", "study", "capture", "direction", "project", "geometry"}
CRASH_WORDS = ("Assertion", "Sanitizer", "runtime error:", "Segmentation", "Validation Error")


@dataclass
class Result:
    rc: int
    out: str
    err: str
    args: list
    seconds: float

    @property
    def json(self):
        return json.loads(self.out)

    def __str__(self):
        return f"$ keel {shlex.join(map(str, self.args))}\nexit {self.rc} after {self.seconds:.1f} s\n{self.out[-2000:]}\n{self.err[-3000:]}"


class Keel:
    def __init__(self, path, env=None, timeout=300):
        self.path = Path(path)
        self.env = {**os.environ, **(env or {})}
        self.device_args = shlex.split(os.environ.get("KEEL_TEST_ARGS", ""))
        self.timeout = float(os.environ.get("KEEL_TEST_TIMEOUT", timeout))

    def argv(self, *args):
        args = [str(a) for a in args]
        extra = self.device_args if args and args[0] in COMPUTING else []
        return [str(self.path), *args[:1], *extra, *args[1:]]

    def __call__(self, *args, rc=0, env=None, **popen):
        """Runs to the end and checks the exit code (`rc`: one or several) and that nothing crashed."""
        t = time.time()
        p = subprocess.run(self.argv(*args), capture_output="stdout" not in popen, env={**self.env, **(env or {})},
                           timeout=self.timeout, stdin=subprocess.DEVNULL,
                           **({"stderr": subprocess.PIPE} if "stdout" in popen else {}), **popen)
        dec = lambda b: (b or b"").decode("utf-8", "replace")
        r = Result(p.returncode, dec(p.stdout), dec(p.stderr), list(args), time.time() - t)
        assert r.rc in ((rc,) if isinstance(rc, int) else rc), str(r)
        assert not any(w in r.err for w in CRASH_WORDS), str(r)
        return r

    def start(self, *args, env=None):
        """Starts without waiting; the caller ends it."""
        return subprocess.Popen(self.argv(*args), env={**self.env, **(env or {})}, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def fails(self, *args, says=(), rc=1, leaves=None, **kw):
        """Must fail with `rc` and a message holding every word of `says`, and change nothing in folder `leaves`."""
        before = listing(leaves)
        r = self(*args, rc=rc, **kw)
        for word in [says] if isinstance(says, str) else says:
            assert str(word).lower() in r.err.lower(), f"the message does not name {word!r}\n{r}"
        assert r.err.strip(), f"no message\n{r}"
        assert listing(leaves) == before, f"left behind: {sorted(listing(leaves) ^ before)}\n{r}"
        return r


def listing(folder):
    """Files below a folder; an empty folder made on the way to an error is no harm."""
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()} if folder else set()


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def tokenize(keel, model, text, tmp, *options):
    f = Path(tmp) / "text.txt"
    f.write_bytes(text if isinstance(text, bytes) else text.encode())
    return keel("tokenize", "-m", model, "--json", "--file", f, *options).json["ids"]


def score(keel, model, rows, tmp, *options):
    keel("score", "-m", model, "--data", write_rows(Path(tmp) / "in.jsonl", rows), "--out", Path(tmp) / "out.jsonl", *options)
    return read_rows(Path(tmp) / "out.jsonl")


def generate(keel, model, prompt, n, *options):
    """The new ids and the whole JSON answer."""
    j = keel("run", "-m", model, "-p", prompt, "-n", n, "--json", *options).json
    return j["ids"], j


def train_args(model, data, out, **o):
    """The argument list of `train`: o's keys are long options with _ for -, True means a bare flag."""
    args = ["train", "-m", model]
    for d in data if isinstance(data, (list, tuple)) else [data]:
        args += ["--data", d]
    args += ["--out", out]
    for k, v in o.items():
        if v is True:
            args.append("--" + k.replace("_", "-"))
        elif v is not None and v is not False:
            args += ["--" + k.replace("_", "-"), v]
    return args


def train(keel, model, rows, tmp, name="a.gguf", **o):
    """Trains on rows given here, in order, without clipping unless told otherwise. Returns (out path, log rows)."""
    tmp = Path(tmp)
    tmp.mkdir(parents=True, exist_ok=True)
    o = {"no_shuffle": True, "grad_clip": 0, "log": tmp / (name + ".log.jsonl"), **o}
    keel(*train_args(model, write_rows(tmp / (name + ".rows.jsonl"), rows), tmp / name, **o))
    return tmp / name, read_log(o["log"])


def shipped_study(path, name, *changes):
    """studies/clerk/NAME.yaml at another place, its files by whole names; changes: (old, new), each of which must be there."""
    text = (ROOT / "studies/clerk" / f"{name}.yaml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    text = text.replace("../../models", str(ROOT / "models"))
    Path(path).write_text(re.sub(r"(?<= )[\w-]+\.jsonl", lambda m: str(ROOT / "studies/clerk" / m[0]), text))
    return path


def read_log(path):
    """Log rows by step; of a step that was done again after a kill the last one counts."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        try:
            r = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line a kill cut off
        rows[r["step"]] = r
    return [rows[s] for s in sorted(rows)]


def wait_steps(proc, log, n, timeout=120):
    """Waits until the log holds n steps or the process has ended."""
    end = time.time() + timeout
    while time.time() < end and proc.poll() is None:
        if Path(log).exists() and Path(log).read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.01)


def kill(proc, sig=signal.SIGKILL):
    if proc.poll() is None:
        proc.send_signal(sig)
    err = proc.communicate(timeout=120)[1].decode("utf-8", "replace")
    return proc.returncode, err
