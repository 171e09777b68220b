# SPDX-License-Identifier: MIT
"""Fixtures of the end-to-end tests. Builds nothing: says what is missing and how to get it."""
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "oracle"))
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

NEEDED = ("numpy", "torch", "transformers", "peft", "gguf", "safetensors")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the slow tests on the real model (KEEL_TEST_MODEL)")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: slow, needs --full; those on the real model need KEEL_TEST_MODEL as well")
    missing = []
    for name in NEEDED:
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise pytest.UsageError(f"Python packages missing: {' '.join(missing)}; tests/README.md says how to make the environment")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):  # not keywords, which hold the names of folders too
                item.add_marker(pytest.mark.skip(reason="slow: give --full"))


@pytest.fixture(scope="session")
def keel(tmp_path_factory, request):
    from keelcli import Keel
    path = Path(os.environ.get("KEEL", ROOT / "build/src/cli/keel"))
    if not path.is_file():
        pytest.exit(f"{path} is missing. Build it: meson setup build && ninja -C build; or set KEEL to the program", 4)
    # A cache of our own: the tests must pass with a cold one, and must not touch the user's.
    cache = os.environ.get("KEEL_TEST_CACHE") or tmp_path_factory.mktemp("cache")
    # A software driver on two cores shared with others does some 5 tokens a second of the real model: the longest command takes 5 minutes.
    seconds = 1800 if request.config.getoption("--full") else 300
    return Keel(path.resolve(), {"XDG_CACHE_HOME": str(cache), "LC_ALL": "C.UTF-8"}, seconds)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with every tiny model of oracle/tiny_models.py."""
    import tiny_models
    out = tmp_path_factory.mktemp("tiny")
    tiny_models.write_all(out)
    return out


# tiny_b has ten quant types, and a software driver compiles the kernels of each in every process: about ten times
# the work of the others. What depends on the types asks for every_model, the rest leaves tiny_b to --full.
TINY_B_FULL = pytest.param("tiny_b", marks=pytest.mark.full)


@pytest.fixture(scope="session", params=["tiny_a", TINY_B_FULL, "tiny_c", "tiny_d"])
def model(request, tiny):
    """Tiny models in turn: path of the GGUF."""
    return tiny / f"{request.param}.gguf"


@pytest.fixture(scope="session", params=["tiny_a", "tiny_b", "tiny_c", "tiny_d"])
def every_model(request, tiny):
    """All tiny models in turn: path of the GGUF."""
    return tiny / f"{request.param}.gguf"


@pytest.fixture(scope="session")
def tiny_a(tiny):
    return tiny / "tiny_a.gguf"


@pytest.fixture(scope="session")
def tiny_c(tiny):
    return tiny / "tiny_c.gguf"


@pytest.fixture(scope="session")
def real():
    """The real 270M; only with KEEL_TEST_MODEL."""
    path = os.environ.get("KEEL_TEST_MODEL")
    if not path:
        pytest.skip("KEEL_TEST_MODEL is not set; tests/README.md names the model")
    return Path(path)


@pytest.fixture(scope="session")
def g270():
    return json.loads((ROOT / "tests/oracle/fixtures/g270.json").read_text())


@pytest.fixture(scope="session")
def oracle():
    """oracle(path) -> gemma3_ref.Ref, loaded once."""
    import gemma3_ref
    return lambda path: gemma3_ref.load(str(path))
