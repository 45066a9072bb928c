"""The parent's side of the peers' process, with shell scripts in the place of its python."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compresskv.errors import CompressKVError, ConfigError
from compresskv.evaluation.press_request import PressCase, PressRequest
from compresskv.peers.answers import read_request
from compresskv.peers.process import PYTHON_VARIABLE, peers_python, run_peers

CASE = PressCase("needle/single", "1", (1, 2, 3), 8, suffix_start=2, reference_ids=(4, 5), done=("full",))
MODULE = "compresskv.evaluation.press_runner"
REQUEST = PressRequest(
    model="smollm2-135m",
    cases=(CASE,),
    presses=("SnapKVPress",),
    budgets=(128, 0.5),
)


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an 'interpreter' that runs a shell script, whatever it is asked to run."""

    def make(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


def test_results_come_while_the_process_still_runs(python: Callable[[str], Path], tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    rows = run_peers(
        python(f"echo '{{\"n\": 1}}'; until [ -e {go_on} ]; do sleep 0.01; done; echo '{{}}'"), REQUEST, MODULE
    )

    assert next(rows) == {"n": 1}
    go_on.touch()
    assert list(rows) == [{}]


def test_the_process_is_given_the_request(python: Callable[[str], Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"

    assert (
        list(run_peers(python(f'[ "$2 $3" = "compresskv.peers.answers {MODULE}" ] && cp "$4" {kept}'), REQUEST, MODULE))
        == []
    )

    assert read_request(kept, PressRequest) == REQUEST


def test_a_process_that_logs_a_lot_is_not_blocked(python: Callable[[str], Path]) -> None:
    assert list(run_peers(python("head -c 1000000 /dev/zero >&2; echo '{}'"), REQUEST, MODULE)) == [{}]


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"none/bin/python does not exist: scripts/peers makes"):
        run_peers(tmp_path / "none/bin/python", REQUEST, MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"\.venv-peers/bin/python does not exist"):
        peers_python()


def test_the_environment_can_be_named_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)

    assert peers_python() == Path(sys.executable)


def test_a_file_that_cannot_be_started_says_how_to_make_one(python: Callable[[str], Path]) -> None:
    path = python("")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"cannot be started \(Permission denied\): scripts/peers makes"):
        list(run_peers(path, REQUEST, MODULE))


def test_an_environment_without_the_package_says_how_to_make_one(python: Callable[[str], Path]) -> None:
    script = "echo \"python: Error while finding module ... No module named 'compresskv'\" >&2; exit 1"
    with pytest.raises(ConfigError, match=r"lacks a package .*No module named 'compresskv'.*scripts/peers makes"):
        list(run_peers(python(script), REQUEST, MODULE))


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is not None, reason="this environment has kvpress")
def test_an_environment_without_kvpress_says_how_to_make_one() -> None:
    with pytest.raises(ConfigError, match=r"^peers: kvpress cannot be imported .*scripts/peers makes [^\n]*$"):
        list(run_peers(Path(sys.executable), REQUEST, MODULE))


def test_a_process_that_dies_keeps_its_results_and_tells_its_last_words(python: Callable[[str], Path]) -> None:
    rows = run_peers(python("echo '{\"n\": 1}'; echo begin >&2; echo 'MemoryError: 9 GB' >&2; exit 3"), REQUEST, MODULE)

    assert next(rows) == {"n": 1}
    with pytest.raises(CompressKVError, match=r"^the peers' process ended with status 3 \(MemoryError: 9 GB\)$"):
        next(rows)


def test_a_process_that_is_killed_is_not_taken_for_done(python: Callable[[str], Path]) -> None:
    with pytest.raises(CompressKVError, match=r"ended with status -9 \(it said nothing\)"):
        list(run_peers(python("kill -9 $$"), REQUEST, MODULE))


@pytest.mark.parametrize("line", ["Loading weights...", "[1]", '{"cut": '])
def test_a_line_that_is_no_result_is_refused(python: Callable[[str], Path], line: str) -> None:
    with pytest.raises(CompressKVError, match="wrote a line that is no result: ") as caught:
        list(run_peers(python(f"echo '{line}'; sleep 60"), REQUEST, MODULE))
    assert line.strip() in str(caught.value)


def test_what_stops_the_whole_request_is_raised(python: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"^peers: no model 'Snap'$"):
        list(run_peers(python("echo '{\"fatal\": \"no model '\"'Snap'\"'\"}'; exit 2"), REQUEST, MODULE))


@pytest.mark.parametrize("interrupt", [None, KeyboardInterrupt, ValueError])
def test_an_early_end_ends_the_process(python: Callable[[str], Path], interrupt: type[BaseException] | None) -> None:
    rows = run_peers(python('echo "{\\"pid\\": $$}"; exec sleep 60'), REQUEST, MODULE)
    pid = next(rows)["pid"]

    if interrupt is None:
        rows.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(interrupt):
            rows.throw(interrupt)  # type: ignore[attr-defined]

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
