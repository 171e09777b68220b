# SPDX-License-Identifier: MIT
"""info, the memory plan, devices, help and usage."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import texts
from keelcli import tokenize, train_args, write_rows

COMMANDS = ("devices", "info", "tokenize", "run", "score", "perplexity", "train", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(keel, command):
    r = keel(command, "--help")
    assert command in r.out and "--" in r.out and not r.err


def test_version_and_overview(keel):
    assert any(c.isdigit() for c in keel("--version").out)
    out = keel("--help").out
    assert all(c in out for c in COMMANDS)


@pytest.mark.parametrize("args,word", [
    ([], "command"), (["swim"], "swim"), (["score", "--fly", "1"], "--fly"), (["tokenize", "x"], "model"),
    (["run", "-m", "M", "-n"], "-n"), (["run", "-m", "M", "-n", "many"], "many"), (["run", "-m", "M", "--temp", "hot"], "hot"),
    (["train", "-m", "M"], "--data"), (["train", "-m", "M", "--data", "d", "--out", "o", "--schedule", "lunar"], "lunar"),
    (["perplexity", "-m", "M", "--file", "f", "--ctx", "-4"], "-4"), (["train", "-m", "M", "--data", "d", "--out", "o", "--lr", "nan"], "nan"),
])
def test_wrong_usage_is_2(keel, args, word):
    keel.fails(*args, says=word, rc=2)


def test_info_json(keel, every_model, oracle):
    j, cfg = keel("info", every_model, "--json").json, oracle(every_model).config
    text = str(j)
    for n in (cfg.num_hidden_layers, cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size, cfg.sliding_window):
        assert str(n) in text, (n, j)
    assert "gemma3" in text


def test_plan_grows_with_what_it_plans(keel, tiny_a):
    def total(*o):
        j = keel("info", tiny_a, "--json", *o).json
        plan = j.get("plan_train") or j["plan_run"]
        return plan["device_bytes"] + plan["host_bytes"]
    base = total("--ctx", 256)
    assert total("--ctx", 1024) > base
    small = total("--rank", 4, "--batch", 1, "--seq-len", 64)
    assert total("--rank", 64, "--batch", 1, "--seq-len", 64) > small
    assert total("--rank", 4, "--batch", 8, "--seq-len", 64) > small


def test_devices_json(keel):
    devices = keel("devices", "--json").json
    devices = devices["devices"] if isinstance(devices, dict) else devices
    assert devices and all("name" in d for d in devices)


def test_devices_are_ordered_by_measured_speed(keel, tmp_path):
    """Two drivers in either order: the same order of speed, the number is that of --device, and measuring is done once."""
    drivers = ["/usr/lib/chromium/vk_swiftshader_icd.json", *map(str, Path("/usr/share/vulkan/icd.d").glob("lvp_icd.*.json"))]
    if len(drivers) != 2 or not all(Path(d).is_file() for d in drivers):
        pytest.skip("needs lavapipe and SwiftShader")
    tmp_path.joinpath("cache").mkdir()
    seen = []
    for order in (drivers, drivers[::-1], drivers):
        j = keel("devices", "--json", env={"VK_ICD_FILENAMES": ":".join(order), "XDG_CACHE_HOME": str(tmp_path / "cache")}).json
        cost = [20 / d["gflops"] + 0.6 / min(d["matvec_gbps"], d["gbps"]) for d in j]
        assert len(j) == 2 and cost == sorted(cost)
        seen.append([d["name"] for d in j])
    assert "llvmpipe" in seen[0][0] and seen[0] == seen[1] == seen[2], "SwiftShader is several times slower at everything"


def test_no_vulkan_device(keel, tiny_a, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", texts.SCORE[:1])
    env = {"VK_ICD_FILENAMES": "/nonexistent/icd.json", "VK_DRIVER_FILES": "/nonexistent/icd.json"}
    keel.fails("score", "-m", tiny_a, "--data", data, "--out", tmp_path / "o.jsonl", says="vulkan", leaves=tmp_path, env=env)
    keel.fails("run", "-m", tiny_a, "-p", "the", says="vulkan", env=env)
    keel("info", tiny_a, env=env)  # needs no device
    keel("tokenize", "-m", tiny_a, "the", env=env)


def test_too_little_memory(keel, tiny_a, tmp_path):
    """Refused before anything runs, with the plan in the message."""
    data = write_rows(tmp_path / "d.jsonl", texts.TRAIN)
    r = keel.fails(*train_args(tiny_a, data, tmp_path / "a.gguf", steps=1, memory_limit="1M"), says=("memory", "weights"), leaves=tmp_path)
    assert any(unit in r.err for unit in ("MB", "MiB", "kB", "KiB"))
    rows = write_rows(tmp_path / "s.jsonl", texts.SCORE)
    keel.fails("score", "-m", tiny_a, "--data", rows, "--out", tmp_path / "o.jsonl", "--memory-limit", "1M", says="memory", leaves=tmp_path)


PEAK = """
import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.full
@pytest.mark.parametrize("batch,tokens", [(4, 64), (1, 128)])
def test_peak_memory_is_the_plan(keel, real, tmp_path, batch, tokens):
    """Peak resident size of training within 15 % of the plan, on a driver whose device memory is the host's."""
    if "lvp" not in os.environ.get("VK_ICD_FILENAMES", "lvp") and "swiftshader" not in os.environ.get("VK_ICD_FILENAMES", ""):
        pytest.skip("device memory is not part of the process size on this driver")
    j = keel("info", real, "--json", "--ctx", 1, "--rank", 16, "--batch", batch, "--seq-len", tokens).json
    plan = j["plan_train"]
    n = tokens * len(texts.LONG) // len(tokenize(keel, real, texts.LONG, tmp_path))  # characters of a row, within a few tokens
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": texts.LONG[:n // 2], "completion": texts.LONG[n // 2:n]}] * batch)
    keel("doctor", "--quick")  # the check at the first use of a device, once, compiles kernels that training does not have
    # A process begins with the peak of the one that it was forked from, and this one may hold models: a small one starts keel.
    p = subprocess.run([sys.executable, "-c", PEAK, *keel.argv(*train_args(real, data, tmp_path / "a.gguf", steps=2, rank=16, batch=batch))],
                       env=keel.env, stdout=subprocess.PIPE, check=True, text=True)
    peak, want = int(p.stdout.split()[-1]) * 1024, plan["device_bytes"] + plan["host_bytes"]
    print("peak", peak, "plan", want)
    assert abs(peak / want - 1) < 0.15
