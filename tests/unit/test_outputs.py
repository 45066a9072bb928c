"""No command writes over what it reads: every output against every input, by whatever name."""

import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import Result, runner
from compresskv.cli import ask, bench, evaluate, explain, profile
from compresskv.cli.outputs import check_outputs
from compresskv.errors import ConfigError

OUTPUTS = {"save_plan", "html", "output", "plot"}
INPUTS = {"document", "profile", "model", "haystack", "needles", "heads", "layers"}
COMMANDS: dict[str, Callable[..., None]] = {
    "ask": ask.ask,
    "explain": explain.explain,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "profile find": profile.find,
    "profile show": profile.show,
    "profile import": profile.import_profile,
    "profile verify": profile.verify,
}
WRITTEN = {("eval", "output"): "records.jsonl", ("profile show", "plot"): "layer_budgets.png"}
WRITTEN[("profile verify", "plot")] = "verify.png"
"""The file in the folder that an option names."""
POSITIONAL = {
    "ask": ("document", "question"),
    "explain": ("document", "question"),
    "profile find": ("model",),
    "profile show": ("profile",),
    "profile verify": ("model", "profile"),
}
REQUIRED = {
    "document": "doc.txt",
    "question": "Who?",
    "heads": "heads.json",
    "layers": "layers.json",
    "output": "out",
    "model": "some-model",
    "profile": "profile.json",
}


def pairs() -> Iterator[tuple[str, str, str]]:
    """(command, output, input) of all that there are."""
    for command, function in COMMANDS.items():
        names = set(inspect.signature(function).parameters)
        numbers = {"layers"} if command == "bench" else set()
        for output in sorted(names & OUTPUTS):
            for read in sorted((names & INPUTS) - numbers):
                yield command, output, read


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd, 100)


def arguments(command: str, **given: str) -> list[str]:
    positional = POSITIONAL.get(command, ())
    needed = {"eval": ("output",), "profile import": ("heads", "layers", "model")}.get(command, ())
    values = {name: REQUIRED[name] for name in (*positional, *needed)} | given
    options = [part for name, value in values.items() if name not in positional for part in (_dashed(name), value)]
    return [*command.split(), *(values[name] for name in positional), *options]


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(("command", "output", "read"), list(pairs()))
def test_an_output_that_is_an_input_is_refused(
    run: Callable[..., Result], tmp_path: Path, command: str, output: str, read: str
) -> None:
    for name in ("doc.txt", "heads.json", "layers.json", "profile.json"):
        (tmp_path / name).write_text("{}")
    folder = tmp_path / "folder"
    folder.mkdir()
    inside = WRITTEN.get((command, output))
    mine = folder / (inside or "mine.txt")
    mine.write_text("precious")
    given = str(folder) if inside else str(mine)
    result = run(*arguments(command, **{read: str(mine), output: given}))
    assert result.code == 2
    assert f"would replace the {read} itself" in result.err
    assert _dashed(output) in result.err
    assert len(result.err.splitlines()) == 1
    assert mine.read_text() == "precious"


def test_bench_does_not_write_two_files_to_one_place(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("bench", "--plot", "one.png", "-o", "./one.png")
    assert result.code == 2
    assert "is the file of" in result.err
    assert not list(tmp_path.iterdir())


class TestSameFile:
    @pytest.fixture
    def mine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "mine"
        path.write_text("precious")
        return path

    @pytest.mark.parametrize("kind", ["relative", "dotted", "symbolic", "hard", "folder link"])
    def test_whatever_it_is_called(self, mine: Path, tmp_path: Path, kind: str) -> None:
        (tmp_path / "symbolic").symlink_to(mine)
        (tmp_path / "hard").hardlink_to(mine)
        (tmp_path / "there").symlink_to(tmp_path)
        name = {"relative": "mine", "dotted": "there/../mine", "folder link": "there/mine"}.get(kind, kind)
        if kind == "dotted":
            name = f"../{tmp_path.name}/mine"
        with pytest.raises(ConfigError, match="would replace the document itself"):
            check_outputs({"output": Path(name)}, {"document": str(mine)})

    def test_standard_input_is_a_file_too(self, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with mine.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            with pytest.raises(ConfigError, match="would replace the document itself"):
                check_outputs({"output": mine}, {"document": "-"})

    @pytest.mark.parametrize("stdin", [None, io.StringIO("text")])
    def test_standard_input_that_is_no_file(self, mine: Path, monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
        monkeypatch.setattr(sys, "stdin", stdin)
        check_outputs({"output": mine}, {"document": "-"})

    def test_a_folder_stands_for_what_is_read_from_it(self, tmp_path: Path) -> None:
        model, texts = tmp_path / "model", tmp_path / "texts"
        (texts / "deep").mkdir(parents=True)
        model.mkdir()
        for path in (model / "config.json", model / "model.safetensors", texts / "deep" / "a.txt"):
            path.write_text("{}")
            with pytest.raises(ConfigError):
                check_outputs({"output": path}, {"model": str(model), "haystack": [texts]})
        for path in (model / "new.json", model / "kept.html", texts / "a.json"):
            check_outputs({"output": path}, {"model": str(model), "haystack": [texts]})

    def test_a_profile_in_the_models_folder_may_be_made_again(self, tmp_path: Path) -> None:
        own = tmp_path / "profile.json"
        own.write_text(json.dumps({"format": "compresskv-profile"}))
        check_outputs({"output": own}, {"model": str(tmp_path)})

    def test_what_is_no_input_may_be_replaced(self, mine: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.write_text("old")
        check_outputs({"output": other, "plot": None}, {"document": str(mine), "model": "org/name", "profile": None})

    def test_devices_are_nobodys(self) -> None:
        check_outputs({"output": Path("/dev/null")}, {"document": "/dev/null"})
