# SPDX-License-Identifier: MIT
"""doctor: variants checked and chosen, broken ones left out, verdicts remembered. KEEL_FAULT breaks shaders on purpose."""
import pytest

from keelcli import read_rows, score

ROW = [{"id": "1", "prompt": "a", "completion": "bcd"}]


@pytest.fixture(scope="module")
def exchange(keel):
    """The families that have a second variant here; skips without any."""
    rows = keel("doctor", "--quick", "--json").json["rows"]
    families = {r["family"] for r in rows if r["variant"] == "exchange"}
    return families or pytest.skip("the device has base variants alone")


def chosen(j):
    return {r["family"]: r["variant"] for r in j["rows"] if r["chosen"] and r["family"]}


def test_quick(keel):
    j = keel("doctor", "--quick", "--json").json
    assert j["base_wrong"] == 0 and all(r["right"] and r["cases"] > 0 and 0 <= r["worst"] <= 1 and r["ms"] > 0 for r in j["rows"])
    assert chosen(j).keys() == {r["family"] for r in j["rows"]} >= {"matvec", "matmul", "matmul_bwd", "lora", "attention", "patches"}
    assert "chosen" in keel("doctor", "--quick").out


def test_first_use_checks_once(keel, tiny_a, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    tmp_path.joinpath("cache").mkdir()
    args = ("run", "-m", tiny_a, "-p", "a", "-n", 1, "-v")
    assert "checking kernels" in keel(*args, env=env).err
    verdict, = (tmp_path / "cache" / "keel").glob("verdict-*.txt")
    assert "checking kernels" not in keel(*args, env=env).err
    # Of other shaders, or damaged: made anew.
    good = verdict.read_text()
    for bad in (good.replace(good.split()[2], "0" * 16), good[:30], "x"):
        verdict.write_text(bad)
        assert "checking kernels" in keel(*args, env=env).err
    assert verdict.read_text().split()[:3] == good.split()[:3]
    # A base variant known to be wrong is said at every start.
    verdict.write_text(good.replace(good.split()[2] + " 0", good.split()[2] + " 2"))
    assert "computes 2 ops wrong" in keel(*args, env=env).err


@pytest.mark.parametrize("fault,word", [("compile:linear_fwd_x_", "does not run"), ("skip:linear_fwd_x_", "should be")])
def test_a_broken_variant_is_left_out(keel, tiny_a, tmp_path, exchange, fault, word):
    r = keel("doctor", "--quick", "--json", env={"KEEL_FAULT": fault})
    bad = [x for x in r.json["rows"] if not x["right"]]
    assert {(x["family"], x["variant"]) for x in bad} == {("matvec", "exchange"), ("matmul", "exchange")}
    assert all(word in x["why"] and not x["chosen"] for x in bad) and r.json["base_wrong"] == 0
    assert chosen(r.json)["matvec"] == chosen(r.json)["matmul"] == "base"
    warnings = [line for line in r.err.splitlines() if "left out" in line]
    assert len(warnings) == 2 and "error:" not in r.err, "one line a variant"
    # The commands go on with what is right, to the same numbers.
    good = score(keel, tiny_a, ROW, tmp_path)
    keel("score", "-m", tiny_a, "--data", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", env={"KEEL_FAULT": fault})
    assert read_rows(tmp_path / "out.jsonl")[0]["logprob"] == pytest.approx(good[0]["logprob"], abs=1e-4)


def test_a_wrong_base_variant_fails(keel):
    r = keel("doctor", "--quick", rc=1, env={"KEEL_FAULT": "skip:linear_bwd_Q"})
    assert "WRONG" in r.out and "cannot be trusted" in r.err


def test_force_a_variant(keel, tiny_a, tmp_path, exchange):
    values = [score(keel, tiny_a, ROW, tmp_path, "--variant", v)[0]["logprob"] for v in ("base", "exchange", "matvec=base,matmul=exchange")]
    assert max(values) - min(values) < 1e-4
    for v, word in (("best", "best"), ("swim=base", "swim"), ("attention=", "no variant")):
        keel.fails("run", "-m", tiny_a, "-p", "a", "-n", 1, "--variant", v, says=word)
    if "--caps" not in keel.device_args:
        keel.fails("run", "-m", tiny_a, "-p", "a", "-n", 1, "--caps", "min", "--variant", "exchange", says=("exchange", "offers no"))


@pytest.mark.parametrize("variant", [None, "base"])
def test_the_clerk_end_to_end(keel, variant):
    w = keel("doctor", "--quick", "--json", *(("--variant", variant) if variant else ())).json["whole"]
    assert w["tokens"] > 100 and w["forward_right"] and w["step_right"]
    assert 0 < w["worst"] < 1e-3 and w["loss_before"] - w["loss_after"] == pytest.approx(w["fall_foretold"], rel=0.02)


@pytest.mark.parametrize("fault,key", [("skip:heads_fwd", "forward_right"), ("skip:geglu_bwd", "step_right")])
def test_the_clerk_finds_what_ops_do_not(keel, fault, key):
    """Shaders that the quick checks leave out."""
    r = keel("doctor", "--quick", "--json", rc=1, env={"KEEL_FAULT": fault})
    assert not r.json["whole"][key] and r.json["base_wrong"] == 0 and "cannot be trusted" in r.err


@pytest.mark.full
def test_all_cases(keel):
    j = keel("doctor", "--json").json
    assert j["base_wrong"] == 0 and all(r["right"] for r in j["rows"]), j
    assert {"rmsnorm", "cross-entropy"} <= {r["op"] for r in j["rows"]}
