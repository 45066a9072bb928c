"""Run a `compresskv` command in the tests' own process."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from compresskv.cli import main, terminal
from compresskv.cli.app import app

GROUP = typer.main.get_command(app)


def commands(group: Any = GROUP, *path: str) -> Iterator[tuple[list[str], Any]]:
    """The words of each command, and the command itself."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield [*path, name], command


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def runner(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], columns: int) -> Callable[..., Result]:
    """A function that runs a command on a terminal of that width, and on a machine that is never slow."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(terminal, "SILENCE_S", 1e6)  # else long work tells from time to time that it goes on

    def run(*args: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["compresskv", *map(str, args)])
        capfd.readouterr()  # transformers tells of what a test saved
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Result(code or 0, *capfd.readouterr())

    return run
