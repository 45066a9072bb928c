"""Errors name options as they were typed. The commands here are made up."""

import pickle
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from compresskv.cli.group import CommandGroup
from compresskv.errors import CompressKVError, ConfigError, ProfileError

app = typer.Typer(cls=CommandGroup)
inner = typer.Typer(cls=CommandGroup)
app.add_typer(inner, name="inner")


@app.command()
@inner.command()
def run(
    document: str,
    budgets: str = "",
    truncate: str = "",
    settings: Annotated[str, typer.Option("--set")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 3,
) -> None:
    """Raise what the test wants."""
    raise _raised[0]


@app.command()
def other(budget: str = "") -> None:
    """A second command, whose options are others."""
    raise _raised[0]


_raised: list[Exception] = []


def told(error: Exception, *args: str) -> str:
    _raised[:] = [error]
    raised = CliRunner().invoke(app, list(args)).exception
    assert raised is error or (isinstance(raised, CompressKVError) and raised.__cause__ is not None)
    return str(raised)


BELOW_1 = ConfigError("must be at least 1", option="max_new_tokens", value=0)
NO_BUDGET = ConfigError("is not a number", option="budget", value="abc")


@pytest.mark.parametrize("command", [["run", "doc.txt"], ["inner", "run", "doc.txt"]], ids=" ".join)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(BELOW_1, "--max-new-tokens 0 must be at least 1", id="an option, by its long name"),
        pytest.param(NO_BUDGET, "--budgets 'abc' is not a number", id="one of several"),
        pytest.param(ProfileError("is empty", option="document", value="x"), "document 'x' is empty", id="an argument"),
        pytest.param(
            ConfigError("must be odd", option="kernel_size", value=4), "kernel_size=4 must be odd", id="no option"
        ),
        pytest.param(ConfigError("nothing named"), "nothing named", id="without an option"),
        pytest.param(
            ConfigError("is odd", option="settings", value="n=1"), "--set 'n=1' is odd", id="typed by another name"
        ),
        pytest.param(
            ConfigError(": no such file", option="document", value=Path("x")), "document 'x': no such file", id="a path"
        ),
        pytest.param(ConfigError("holds 0", option="budgets", value=(1, 0)), "--budgets 1,0 holds 0", id="a list"),
        pytest.param(ConfigError(": a number is needed", option="budgets"), "--budgets: a number is needed", id="none"),
        pytest.param(
            ConfigError("is long: cut it with truncate='middle' (or budget=3%), window_size=4"),
            "is long: cut it with --truncate 'middle' (or --budgets 3%), window_size=4",
            id="advice that names other options",
        ),
    ],
)
def test_an_error_names_what_was_typed(error: CompressKVError, message: str, command: list[str]) -> None:
    assert told(error, *command) == message


def test_each_command_has_its_own_options() -> None:
    assert told(NO_BUDGET, "other") == "--budget 'abc' is not a number"
    assert told(BELOW_1, "other") == "max_new_tokens=0 must be at least 1"


def test_python_is_told_by_its_own_name() -> None:
    assert str(BELOW_1) == "max_new_tokens=0 must be at least 1"
    assert str(NO_BUDGET) == "budget='abc' is not a number"


def test_errors_travel_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(NO_BUDGET))
    assert (str(copy), copy.problem, copy.option, copy.value) == (str(NO_BUDGET), "is not a number", "budget", "abc")
