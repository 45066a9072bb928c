"""The log of finished runs: what was written stays, whatever happened to the process that wrote it."""

import json
from pathlib import Path

import pytest

from compresskv.calibration.runs import RunLog
from compresskv.errors import ProfileError

A, B, C = ("heads", "256-0", "a"), ("heads", "256-0", "b"), ("errors", "256-0", "0123")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "model.jsonl"


def keys_in(path: Path) -> list[tuple[str, ...]]:
    return [tuple(json.loads(line)["key"]) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_was_added_is_there_and_still_there_when_opened_again(path: Path) -> None:
    log = RunLog(path)
    assert len(log) == 0
    log.add(A, {"answer": "naïve \u2028 line\n", "semantic": [[0.123456, 0.0]]})
    log.add(C, [[0.5, 1e-7]])
    for opened in (log, RunLog(path)):
        assert len(opened) == 2
        assert A in opened
        assert B not in opened
        assert opened[A] == {"answer": "naïve \u2028 line\n", "semantic": [[0.123456, 0.0]]}
        assert opened[C] == [[0.5, 1e-7]]


def test_a_run_is_on_disk_as_soon_as_it_is_added(path: Path) -> None:
    log = RunLog(path)
    for number, key in enumerate([A, B, C], start=1):
        log.add(key, number)
        assert len(keys_in(path)) == number


def test_a_run_is_never_kept_twice(path: Path) -> None:
    log = RunLog(path)
    log.add(A, 1)
    with pytest.raises(ValueError, match="already"):
        log.add(A, 2)
    assert keys_in(path) == [A]


@pytest.mark.parametrize("num_lost", [2, 3, 10, 30])
def test_a_last_line_that_a_kill_cut_short_is_dropped(path: Path, num_lost: int) -> None:
    log = RunLog(path)
    log.add(A, 1)
    log.add(B, "to be cut short")
    path.write_bytes(path.read_bytes()[:-num_lost])
    again = RunLog(path)
    assert A in again
    assert B not in again
    again.add(B, 3)
    assert keys_in(path) == [A, B]
    assert RunLog(path)[B] == 3


@pytest.mark.parametrize("damage", [b"\0\0\0", b"\xff\xfe", b"{}", b"[1]", b"7", b'{"key": ["x"], "resu'])
def test_a_damaged_line_costs_its_own_run_only(path: Path, damage: bytes) -> None:
    log = RunLog(path)
    log.add(A, 1)
    damaged = path.read_bytes() + damage + b"\n"
    path.write_bytes(damaged)
    RunLog(path)
    assert path.read_bytes() == damaged  # to look at it changes nothing
    with pytest.warns(UserWarning, match="1 line of"):
        RunLog(path).add(B, 2)
    assert path.with_name("model.unreadable-1.jsonl").read_bytes() == damaged
    again = RunLog(path)
    assert (len(again), again[A], again[B]) == (2, 1, 2)


def test_an_unwritable_place_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ProfileError, match="cannot keep finished runs") as caught:
        RunLog(tmp_path / "file" / "runs.jsonl")
    assert "\n" not in str(caught.value)


def test_a_place_that_becomes_unwritable_keeps_what_there_was(path: Path) -> None:
    log = RunLog(path)
    log.add(A, 1)
    path.rename(path.with_suffix(".kept"))
    path.mkdir()
    with pytest.raises(ProfileError, match="cannot keep finished runs"):
        log.add(B, 2)
    assert B not in log
    assert keys_in(path.with_suffix(".kept")) == [A]
