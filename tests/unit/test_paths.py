"""Paths that cannot be looked at or written are told in one line: before anything is computed, and everywhere."""

import ast
import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import compresskv
import compresskv.bench.subject
import compresskv.models.load
from commands import Result, commands, runner
from compresskv.errors import CompressKVError, ConfigError, ModelError
from compresskv.system import paths
from compresskv.system.files import try_place, write_text

SOURCE = Path(compresskv.__file__).parent
LONG = "x" * 300

ELSEWHERE = {
    "evaluation/tasks/jsonl.py": "a path within an archive, which is there or not",
    "cli/chat.py": "tells that there is no such user",
    "system/paths.py": "the helpers",
}
"""Files that look at paths otherwise, and why they may."""

ASK = ["doc.txt", "Who?"]
EVAL = ["eval", "-o", "run", "--tasks"]
INPUTS = {
    "ask a model": ["ask", *ASK, "--method", "snapkv", "--model", "{}"],
    "ask a folder's": ["ask", *ASK, "--method", "snapkv", "--model", "{}/model"],
    "ask a document": ["ask", "{}", "Who?"],
    "ask with a profile": ["ask", *ASK, "--profile", "{}"],
    "chat": ["chat", "{}"],
    "read": ["read", "{}"],
    "compile": ["compile", "--model", "{}"],
    "find": ["profile", "find", "{}"],
    "needles": ["profile", "find", "smollm2-135m", "--needles", "{}"],
    "haystack": ["profile", "find", "smollm2-135m", "--haystack", "{}"],
    "show": ["profile", "show", "{}"],
    "verify": ["profile", "verify", "smollm2-135m", "{}"],
    "import": ["profile", "import", "--heads", "{}", "--layers", "{}", "--model", "model"],
    "session": ["session", "show", "{}"],
    "report": ["report", "{}"],
    "data": [*EVAL, "longbench", "--data", "{}"],
    "suite": ["eval", "-o", "run", "--suite", "standard", "--data", "{}"],
    "eval's haystack": [*EVAL, "needle", "--haystack", "{}"],
}
OUTPUTS = {
    "plan": ["ask", *ASK, "--method", "snapkv", "--save-plan", "{}"],
    "page": ["explain", *ASK, "--method", "snapkv", "--html", "{}"],
    "session": ["read", "doc.txt", "--method", "snapkv", "-o", "{}"],
    "bench": ["bench", "--random", "tiny", "-o", "{}"],
    "plot": ["bench", "--random", "tiny", "--plot", "{}.png"],
    "profile": ["profile", "find", "smollm2-135m", "-o", "{}"],
    "figures": ["profile", "show", "smollm2-135m", "--plot", "{}"],
    "run": [*EVAL, "needle", "-o", "{}"],
}

FOLDERS = {
    "figures": ["profile", "show", "smollm2-135m", "--plot", "{}"],
    "run": [*EVAL, "needle", "-o", "{}"],
    "suite": ["eval", "--suite", "standard", "-o", "{}"],
    "report": ["report", "nothing", "-o", "{}"],
    "sessions": ["read", "doc.txt", "--method", "snapkv", "-o", "{}/"],
}
"""Outputs that are folders."""
FILES = {name: words for name, words in OUTPUTS.items() if name not in (*FOLDERS, "session", "plot")} | {
    "figure": ["bench", "--random", "tiny", "--plot", "{}"],
    "imported": ["profile", "import", "--published", "Llama-3.1-8B-Instruct", "-o", "{}"],
    "calibrated": ["profile", "calibrate", "profile.json", "run", "-o", "{}"],
}
"""Outputs that are files, and no folder may be named for."""

WORDS = [*INPUTS.values(), *OUTPUTS.values()]
WORD_IDS = [*INPUTS, *(f"to {name}" for name in OUTPUTS)]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Run a command in a folder with a document, where loading a model is an error of its own."""
    real = compresskv.models.load.load

    def load(spec: Any, **options: Any) -> None:
        if LONG not in str(spec) and "locked" not in str(spec):
            raise AssertionError("a model is loaded")
        real(spec, **options)

    monkeypatch.setattr(compresskv.models.load, "load", load)
    monkeypatch.setattr(compresskv.bench.subject, "load", load)
    monkeypatch.setattr(compresskv.bench.subject, "random_subject", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "doc.txt").write_text("Some text.", encoding="utf-8")
    return runner(monkeypatch, capfd, columns=80)


def told(result: Result) -> str:
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("compresskv: ")
    return line


@pytest.mark.parametrize("words", WORDS, ids=WORD_IDS)
def test_a_name_that_is_too_long(call: Callable[..., Result], words: list[str]) -> None:
    assert "File name too long" in told(call(*(word.format(LONG) for word in words)))


@pytest.mark.parametrize("words", OUTPUTS.values(), ids=OUTPUTS)
def test_what_is_protected_against_writing(
    call: Callable[..., Result], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[-2] == "-o" and words[0] == "eval":
        pytest.skip("a folder, of which nothing is replaced")
    places = [tmp_path / name for name in ("kept", "kept.png")]
    if "show" in words:
        places = [tmp_path / "kept" / "layer_budgets.png"]
        places[0].parent.mkdir()
    for place in places:
        place.touch()
    protect(monkeypatch, places)
    assert "cannot be written: Permission denied" in told(call(*(word.format("kept") for word in words)))


def protect(monkeypatch: pytest.MonkeyPatch, places: list[Path]) -> None:
    """Against root, too, who may all."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).absolute() not in places and real(path, mode))


@pytest.mark.parametrize("words", FILES.values(), ids=FILES)
def test_a_file_that_is_named_as_a_folder(call: Callable[..., Result], words: list[str], tmp_path: Path) -> None:
    assert "'new/' names a folder: give a file" in told(call(*(word.format("new/") for word in words)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [name for name in FILES if name != "figure"])
def test_a_file_of_another_kind_is_not_replaced(call: Callable[..., Result], name: str, tmp_path: Path) -> None:
    place = tmp_path / ("notes.html" if name == "page" else "notes.txt")
    place.write_text("Mine.", encoding="utf-8")
    line = told(call(*(word.format(place.name) for word in FILES[name])))
    assert f"'{place.name}' exists and is no {'HTML' if name == 'page' else 'JSON'}: name another file" in line
    assert place.read_text(encoding="utf-8") == "Mine."


@pytest.mark.parametrize("words", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_protected_against_writing(
    call: Callable[..., Result], words: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    folder.chmod(0o500)
    with permissions_that_count():
        for name in ("kept", "kept/new"):
            *_, line = call(*(word.format(name) for word in words)).err.splitlines()  # a suite tells what it leaves out
            assert line.startswith("compresskv: --")
            assert line.endswith(": Permission denied")


@pytest.mark.parametrize("name", ["kept/records.jsonl", "kept/run.lock"])
def test_a_run_that_is_protected_against_writing(
    call: Callable[..., Result], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / name).touch()
    protect(monkeypatch, [tmp_path / name])
    assert "'kept' cannot be written: Permission denied" in told(call("eval", "-o", "kept"))


@contextlib.contextmanager
def permissions_that_count() -> Iterator[None]:
    """Root may enter any folder: here without the capabilities that let it."""
    if os.name != "posix":
        pytest.skip("permissions are otherwise here")
    if os.geteuid() != 0:
        yield
        return
    head, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # of two sets of 32 capabilities
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "capset") or libc.capget(head, before) != 0:
        pytest.skip("no capabilities of Linux")
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: they are taken from the effective set alone
    assert libc.capset(head, less) == 0
    try:
        yield
    finally:
        assert libc.capset(head, before) == 0


@pytest.mark.parametrize("words", WORDS, ids=WORD_IDS)
def test_a_folder_that_one_may_not_enter(call: Callable[..., Result], words: list[str], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    with permissions_that_count():
        result = call(*(word.format("locked/in") for word in words))
    locked.chmod(0o700)
    assert "Permission denied" in told(result)


def paths_of_commands() -> Iterator[list[str]]:
    """Words that leave each path of each command empty."""
    for words, command in commands():
        hints = get_type_hints(command.callback.__wrapped__)
        for parameter in command.params:
            if "Path" in str(hints.get(parameter.name)):
                option = max(parameter.opts, key=len)
                given = [option, ""] if parameter.param_type_name == "option" else [""]
                yield [*words, *given]
                if len(given) > 1:
                    yield [*words, f"{option}="]


EMPTY = list(paths_of_commands())


@pytest.mark.parametrize("words", EMPTY, ids=map(" ".join, EMPTY))
def test_an_empty_path_is_not_the_current_folder(call: Callable[..., Result], words: list[str]) -> None:
    assert told(call(*words)).endswith(" '' names nothing: give a path")


def test_other_empty_words_are_the_commands_own(call: Callable[..., Result]) -> None:
    assert len(EMPTY) > 20
    assert told(call("ask", "doc.txt", "")) == "compresskv: the question is empty"
    assert "'run=' holds no run" in told(call("report", "run="))


def test_nothing_else_in_the_package_looks_at_paths() -> None:
    names = {"is_dir", "is_file", "exists", "expanduser"}
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in names
    }
    assert found == set(ELSEWHERE)


def test_a_file_error_that_nobody_explains(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr("compresskv.cli.catalogue.json.dumps", fail)
    assert told(call("methods", "--json")) == "compresskv: 'there': Permission denied"


@pytest.mark.parametrize("fail", [lambda *_: torch.empty(1 << 48), lambda *_: bytes(1 << 60)], ids=["torch", "Python"])
def test_no_memory(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    monkeypatch.setattr("compresskv.cli.catalogue.json.dumps", fail)
    assert told(call("methods", "--json")).startswith("compresskv: memory does not suffice: give a shorter text")


def test_a_user_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        compresskv.load("~nosuchuser/x")
    monkeypatch.setenv("COMPRESSKV_CACHE", "~nosuchuser/x")
    with pytest.raises(ConfigError, match="COMPRESSKV_CACHE='~nosuchuser/x': no such user"):
        paths.cache_dir()


def test_a_long_name_as_a_model() -> None:
    with pytest.raises(CompressKVError, match="File name too long"):
        compresskv.load(LONG)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "語" * 85], ids=["ASCII", "Latin", "Japanese"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    try_place(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_devices_may_be_written_to() -> None:
    try_place(Path("/dev/null"))
