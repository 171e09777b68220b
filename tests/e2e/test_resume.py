# SPDX-License-Identifier: MIT
"""A run that is killed, stopped or refused must be able to go on to the same bits."""
import os
import random
import signal
import subprocess
import time

import pytest

import texts
from keelcli import kill, listing, read_log, train_args, wait_steps, write_rows

STEPS = 14


@pytest.fixture(scope="module")
def whole(keel, tiny_c, tmp_path_factory):
    """The uninterrupted run: (data, options, adapter bytes, log)."""
    tmp = tmp_path_factory.mktemp("whole")
    data = write_rows(tmp / "d.jsonl", texts.TRAIN)
    o = dict(steps=STEPS, batch=2, accum=2, rank=4, lr=1e-3, seed=9, schedule="cosine", warmup=2)
    keel(*train_args(tiny_c, data, tmp / "a.gguf", log=tmp / "l.jsonl", **o))
    return data, o, (tmp / "a.gguf").read_bytes(), [(r["loss"], r["grad_norm"], r["lr"]) for r in read_log(tmp / "l.jsonl")]


def args_in(tmp, tiny_c, whole, **o):
    data, opts, _, _ = whole
    return train_args(tiny_c, data, tmp / "a.gguf", log=tmp / "l.jsonl", resume=tmp / "state", **{**opts, "save_every": 1, **o})


def check_end(tmp, whole):
    assert (tmp / "a.gguf").read_bytes() == whole[2]
    log = read_log(tmp / "l.jsonl")
    assert [(r["loss"], r["grad_norm"], r["lr"]) for r in log] == whole[3]
    left = listing(tmp)
    assert not [f for f in left if ".tmp" in f or f.endswith(".part")], left


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.full) for s in range(1, 7))])
def test_killed_at_random_moments(keel, tiny_c, whole, tmp_path, seed):
    """kill -9 three times, anywhere: while loading, inside a step, while the state is written (every step)."""
    rng = random.Random(seed)
    args = args_in(tmp_path, tiny_c, whole)
    for round_ in range(3):
        p = keel.start(*args)
        wait_steps(p, tmp_path / "l.jsonl", rng.randrange(1, 4) + 3 * round_)
        time.sleep(rng.random() * 0.05)
        kill(p)
        assert not (tmp_path / "a.gguf").exists() or (tmp_path / "a.gguf").read_bytes() == whole[2]
    keel(*args)
    check_end(tmp_path, whole)


def test_leftovers_of_a_killed_process(keel, tiny_c, whole, tmp_path):
    """What a killed process left half-written goes when the file is written again; what a living one writes stays."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    old, living = (tmp_path / f"a.gguf.tmp-{pid}" for pid in (dead.pid, os.getpid()))
    other = tmp_path / f"b.gguf.tmp-{dead.pid}"
    for f in (old, living, other):
        f.write_text("half")
    keel(*args_in(tmp_path, tiny_c, whole, steps=1))
    assert not old.exists() and living.exists() and other.exists()


def test_state_every_few_steps(keel, tiny_c, whole, tmp_path):
    args = args_in(tmp_path, tiny_c, whole, save_every=5)
    p = keel.start(*args)
    wait_steps(p, tmp_path / "l.jsonl", 8)
    kill(p)
    keel(*args)
    check_end(tmp_path, whole)


@pytest.mark.parametrize("fault", ["lost", "drop"])
def test_lost_device(keel, tiny_c, whole, tmp_path, fault):
    """A device that is lost, or reset in silence, in the middle: the last state is named, and going on gives the same bits."""
    args = args_in(tmp_path, tiny_c, whole, save_every=2)
    for submission in (60, 90, 120, 45, 30): # one that lies in a step behind the first state, before the last
        r = keel(*args, rc=(0, 1), env={"KEEL_FAULT": f"{fault}:{submission}"})
        if r.rc and "go on with --resume" in r.err:
            break
        for f in tmp_path.rglob("*"):
            if f.is_file():
                f.unlink()
    assert r.rc == 1 and "lost in step" in r.err and "state of step" in r.err, str(r)
    assert ("did not say so" in r.err) == (fault == "drop") and not (tmp_path / "a.gguf").exists()
    keel(*args)
    check_end(tmp_path, whole)


def test_lost_before_a_state(keel, tiny_c, whole, tmp_path):
    r = keel.fails(*args_in(tmp_path, tiny_c, whole, save_every=0), env={"KEEL_FAULT": "lost:40"}, says=("device lost", "before a state"))
    assert "--save-every" in r.err


@pytest.mark.parametrize("sig", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)], ids=["SIGINT", "SIGTERM"])
def test_stop_saves_the_state(keel, tiny_c, whole, tmp_path, sig):
    args = args_in(tmp_path, tiny_c, whole, save_every=0)
    p = keel.start(*args)
    wait_steps(p, tmp_path / "l.jsonl", 3)
    rc, err = kill(p, sig)
    if rc == 0:
        pytest.skip("the run was over before the signal came")
    assert rc == 1 and "resume" in err, (rc, err)
    assert not (tmp_path / "a.gguf").exists()
    done = len(read_log(tmp_path / "l.jsonl"))
    keel(*args)
    check_end(tmp_path, whole)
    assert done >= 3


def test_finished_run_can_be_asked_again(keel, tiny_c, whole, tmp_path):
    args = args_in(tmp_path, tiny_c, whole)
    keel(*args)
    keel(*args)
    check_end(tmp_path, whole)


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"rank": 5}, {"seed": 10}, {"batch": 1}], ids=lambda c: next(iter(c)))
def test_state_of_another_run(keel, tiny_c, whole, tmp_path, change):
    keel(*args_in(tmp_path, tiny_c, whole, steps=2, schedule="constant", warmup=0))
    (tmp_path / "a.gguf").unlink()
    keel.fails(*args_in(tmp_path, tiny_c, whole, steps=4, schedule="constant", warmup=0, **change), says="state", leaves=tmp_path)


def test_damaged_state(keel, tiny_c, whole, tmp_path):
    keel(*args_in(tmp_path, tiny_c, whole, steps=2))
    for f in (tmp_path / "state").rglob("*"):
        if f.is_file():
            f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    keel.fails(*args_in(tmp_path, tiny_c, whole), says=str(tmp_path / "state"))
