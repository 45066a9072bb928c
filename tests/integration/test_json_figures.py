"""What every command prints as JSON: one kind of number to a name, and no budget where nothing is evicted."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import planted
from commands import Result, runner
from compresskv.bench import limits

QUESTION = "What of amber?"
MODEL = ["--model", "model"]
METHODS = ["--method", "full", "--compare", "snapkv,adakv", "--budget", "64"]
BENCH = ["--random", "tiny", "--repeats", "1", "--new-tokens", "3", "--dtype", "float32", "--device", "cpu"]
COMMANDS: dict[str, list[str]] = {
    "ask": ["ask", "doc.txt", QUESTION, *MODEL, *METHODS],
    "ask a share": ["ask", "doc.txt", QUESTION, *MODEL, "--method", "full", "--compare", "snapkv", "--budget", "10%"],
    "explain": ["explain", "doc.txt", QUESTION, *MODEL, *METHODS],
    "read": ["read", "doc.txt", *MODEL, "--method", "full", "-o", "full.kvc"],
    "read less": ["read", "doc.txt", *MODEL, "--method", "snapkv", "--budget", "64", "-o", "less.kvc"],
    **{
        f"{verb} {name}": [*words, f"{name}.kvc", *rest]
        for name in ("full", "less")
        for verb, words, rest in (
            ("show", ["session", "show"], []),
            ("ask", ["ask"], [QUESTION]),
            ("explain", ["explain"], [QUESTION]),
        )
    },
    "eval": [
        *("eval", *MODEL, "--methods", "full,snapkv,adakv", "--budgets", "64", "-o", "run", "--haystack", "hay.txt"),
        *("--lengths", "400", "--depths", "50", "--limit", "1", "--no-answers"),
    ],
    "report": ["report", "run"],
    "bench": ["bench", *BENCH, "--lengths", "96", "--budgets", "64,full", "--methods", "full,snapkv,adakv"],
}
MEANS = re.compile(
    "retained_per_layer|(held|retained|logical)_tokens|mean_.*|.*_(s|ms|ratio|fraction|recall|agreement|divergence|loss)"
)
COUNTS = re.compile(".*_tokens|(.*_)?nbytes(_.*)?|num_.*|examples|records|prefills|configurations|counts|retained")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    planted.save(folder / "model")
    planted.write_haystack(folder / "hay.txt")
    (folder / "doc.txt").write_text(" ".join([*planted.haystack_sentences(20), planted.needle("amber")]))
    return folder


def test_a_name_has_one_kind_of_number_and_full_no_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setitem(limits._READ_NBYTES, "cpu", 1 << 20)
    monkeypatch.setitem(limits._MATRIX_SIZE, "cpu", 64)
    monkeypatch.setattr(limits, "_LEAST_S", 0.0)
    call: Callable[..., Result] = runner(monkeypatch, capfd, columns=80)
    told = {name: _parsed(call(*words, "--json")) for name, words in COMMANDS.items()}
    lines = (place / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    told["records"] = [json.loads(line) for line in lines]

    methods: set[str] = set()
    for command, result in told.items():
        for name, value in _named("", result):
            assert not MEANS.fullmatch(name) or value is None or type(value) is float, (command, name, value)
            if COUNTS.fullmatch(name) and not MEANS.fullmatch(name) and command != "report":  # all means, over cases
                assert value is None or type(value) is int, (command, name, value)
        for one in _compressed(result):
            assert (one["budget"] is None) == (one["method"] in ("full", "plain")), (command, one["method"])
            methods.add(one["method"])
    assert methods == {"full", "snapkv", "adakv", "plain"}


def _parsed(result: Result) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out)


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every number with its name; of a list, the list's."""
    if isinstance(value, dict):
        for inner, one in value.items():
            yield from _named(inner, one)
    elif isinstance(value, list):
        for one in value:
            yield from _named(name, one)
    elif not isinstance(value, str | bool):
        yield name, value


def _compressed(value: Any) -> Iterator[dict[str, Any]]:
    """Whatever says a method and a budget."""
    if isinstance(value, dict):
        if {"method", "budget"} <= value.keys():
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _compressed(one)
