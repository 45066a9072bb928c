"""The parts of `scripts/check-gpu`, and how they are run, on the CPU with the tiny geometry."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.gpu.__main__ import TINY, Sizes, app, tasks
from benchmarks.gpu.figure import draw
from benchmarks.gpu.parts import bounded, end_to_end, table
from benchmarks.processes import run_part

PATHS = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *map(str, __import__("sys").path)])}


def task(name: str) -> dict[str, Any]:
    return next(own for known, own, _ in tasks(TINY, "cpu", 10) if known == name)


def test_a_part_that_hangs_is_ended_and_keeps_what_it_told() -> None:
    row = run_part("parts_of_a_check", {"kind": "hangs"}, 4, PATHS)
    assert row["failed"] == "no answer in 4 s"
    assert row["rows"] == [1]
    assert "going on" in row["log"]


def test_a_part_answers_or_says_how_it_failed() -> None:
    assert run_part("parts_of_a_check", {"kind": "answers", "number": 21}, 30, PATHS)["doubled"] == 42
    row = run_part("parts_of_a_check", {"kind": "fails"}, 30, PATHS)
    assert row["failed"] == "exit code 1"
    assert "out of numbers" in row["log"]


def test_ten_minutes_hold_what_matters_most_first_and_more_time_holds_more_tests() -> None:
    parts = list(tasks(Sizes(), "cuda", 10))
    assert [name for name, *_ in parts][:3] == ["starts", "24 GB", "large table"]
    assert sum(limit for *_, limit in parts[:5]) <= 600
    every = [
        own["every"] for minutes in (10, 20, 1000) for _, own, _ in tasks(Sizes(), "cuda", minutes) if "every" in own
    ]
    assert every == [40, 20, 1]
    assert all(json.loads(json.dumps(own))["device"] == "cuda" for _, own, _ in parts)


def test_an_unknown_part_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    output = tmp_path / "new" / "check.json"
    done = CliRunner().invoke(app, ["check", "-o", str(output), "--only", "starts,large tables"])
    said = " ".join(done.stderr.replace("│", "").split())
    assert done.exit_code == 2
    assert "'large tables' is no part of it; parts are starts, 24 GB, large table," in said
    assert not output.parent.exists()


def test_a_long_prompt_is_read_within_bounds() -> None:
    found = bounded(task("24 GB"), lambda _: None)
    assert found["peak_nbytes"] >= found["weights_nbytes"] > found["kv_nbytes"] > 0
    assert found["decode_ms"] > 0


@pytest.mark.slow
def test_rows_of_the_table_come_a_length_after_another() -> None:
    told: list[Mapping[str, Any]] = []
    found = table(task("large table"), told.append)
    assert [len(one["rows"]) for one in told] == [3, 6]
    assert [(row["length"], row["method"]) for row in found["rows"]] == [
        (length, method) for length in TINY.lengths for method in ("plain", "snapkv", "blend")
    ]


def test_the_figure_shows_seconds_and_memory_to_the_last_token(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = {}
    for name in ("to the end with blend", "to the end with plain"):
        own, told = task(name), list[Mapping[str, Any]]()
        parts[name] = {"task": own, **end_to_end(own, lambda found, told=told: told.append(dict(found)))}
        rows = parts[name]["rows"]
        assert [row["length"] for row in rows] == list(TINY.lengths)
        assert all(row["total_s"] >= row["prefill_s"] > 0 for row in rows)
        assert len(told) == len(rows)
    draw({"device": "cpu", "parts": parts}, tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    draw({"device": "cpu", "parts": {"starts": {"failed": "exit code 1"}}}, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
