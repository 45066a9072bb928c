"""Shared by all tests: one thread a process, models that each test must leave as it found them, fewer combinations."""

import gc
import os
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from compresskv.compiled import decoding
from pairs import covering_pairs

torch.set_num_threads(1)
for told in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(told, None)  # consoles remember what they find when they are made
os.environ["TERM"] = "xterm"  # else a dumb one has 80 columns, whatever a test asks for
if sys.version_info < (3, 12):  # else setuptools replaces distutils, and tests that compile depend on those before them
    os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")

_BEGAN = pytest.StashKey[float]()

FEW_METHODS = ("full", "snapkv", "adakv", "compresskv", "blend", "knorm")
"""One of each kind: nothing is evicted; heads choose alone, equal numbers or others; layers differ, by a profile; all
layers decide together; no window."""


@pytest.fixture(autouse=True)
def _models_keep_their_attention() -> Iterator[None]:
    yield
    for model, attn_implementation in tiny.shared_models():
        assert model.config._attn_implementation == attn_implementation


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled steps, shared by the workers of a run: what one has compiled, the others load."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packages"


@pytest.fixture
def stored_packages(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages are kept for the whole run, and loaded anew by each test."""
    monkeypatch.setenv("COMPRESSKV_CACHE", str(packages))
    decoding._loaded.clear()
    yield
    decoding._loaded.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="Run contract tests of three parameters and more with every combination, not with every pair of values.",
    )
    parser.addoption(
        "--few-methods",
        action="store_true",
        help="Run contract tests with one method of each kind: for another transformers, which methods never see.",
    )
    parser.addoption("--every", type=int, default=1, metavar="N", help="Run one of N tests, always the same.")
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="Begin no test after that time.")
    parser.addoption("--sweep", action="store_true", help="Collect tests/sweep, too.")
    parser.addoption("--write-models", action="store_true", help="Let the sweep renew docs/models.md.")


def pytest_collection_finish() -> None:
    """Whatever libraries and tests have imported stays: searching it for garbage took a seventh of the run."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGAN] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    deadline = item.config.getoption("--deadline")
    if deadline is not None and time.monotonic() - item.config.stash[_BEGAN] > deadline:
        item.session.shouldstop = "the deadline is over"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "sweep" and not config.getoption("--sweep") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--few-methods"):
        _leave_out(config, items, _of_other_methods(items))
    if not config.getoption("--all-combinations"):
        _leave_out(config, items, _beyond_pairs(items))
    if (every := config.getoption("--every")) > 1:
        _leave_out(config, items, {item for item in items if zlib.crc32(item.nodeid.encode()) % every})


def _beyond_pairs(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests of contracts whose every pair of values is in others, too."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "contract" in item.path.parts and len(_parameters(item)) > 2:
            tests[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for cases in tests.values():
        kept = covering_pairs([_parameters(item) for item in cases])
        left_out |= set(cases) - {cases[number] for number in kept}
    return left_out


def _leave_out(config: pytest.Config, items: list[pytest.Item], left_out: set[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def _of_other_methods(items: list[pytest.Item]) -> set[pytest.Item]:
    """Cases of contract tests with other methods than `FEW_METHODS`, of tests that have cases with these."""
    by_test: dict[str, dict[pytest.Item, str]] = defaultdict(dict)
    for item in items:
        method = getattr(getattr(item, "callspec", None), "params", {}).get("method")
        if "contract" in item.path.parts and method in tiny.METHODS:
            by_test[item.nodeid.partition("[")[0]][item] = method
    few = set(FEW_METHODS)
    return {item for cases in by_test.values() if few & {*cases.values()} for item in cases if cases[item] not in few}


def _parameters(item: pytest.Item) -> tuple[tuple[str, str], ...]:
    """Each parameter's name and value, as text: some values cannot be hashed."""
    callspec = getattr(item, "callspec", None)
    return () if callspec is None else tuple((name, repr(value)) for name, value in sorted(callspec.params.items()))
