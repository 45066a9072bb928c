"""Inputs that have no end are refused when they hold more than any can, and nothing in the package reads otherwise."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compresskv
from commands import Result, runner
from compresskv.errors import PlanError
from compresskv.plans import plan
from compresskv.system.inputs import MAX_NBYTES, read_bytes, read_json

SOURCE = Path(compresskv.__file__).parent
ENDLESS = Path("/dev/zero")

ELSEWHERE = {
    "evaluation/run_folder.py": "a log that we write, of any length",
    "system/jsonl_log.py": "a log that we write, of any length",
    "system/processor.py": "a file of the kernel's",
    "system/memory.py": "files of the kernel's",
    "explain/page.py": "a file of this package",
    "compiled/package.py": "files of this package and of its cache",
    "compiled/packed_attention.py": "files of this package",
}
"""Files that read whole files otherwise, and why they may."""

FIND = ["profile", "find", "smollm2-135m"]
IMPORT = ["profile", "import", "--model", "model", "--layers"]


@pytest.mark.skipif(not ENDLESS.exists(), reason="a device of POSIX")
@pytest.mark.parametrize(
    "args",
    [
        ["ask", "doc.txt", "Who?", "--profile", ENDLESS],
        ["explain", "doc.txt", "Who?", "--profile", ENDLESS],
        ["eval", "-o", "run", "--profile", ENDLESS],
        ["profile", "verify", "smollm2-135m", ENDLESS],
        [*FIND, "--needles", ENDLESS],
        [*IMPORT, ENDLESS, "--heads", ENDLESS],
    ],
    ids=["ask", "explain", "eval", "verify", "needles", "import"],
)
def test_an_input_without_end(
    args: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text("Some text.", encoding="utf-8")
    call: Callable[..., Result] = runner(monkeypatch, capfd, columns=80)
    result = call(*args)
    assert result.code == 2
    assert re.fullmatch(r"compresskv: .*: it holds more than 64 MB\n", result.err)


@pytest.mark.skipif(not ENDLESS.exists(), reason="a device of POSIX")
def test_a_plan_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MOST_NBYTES", 2 * 2**20)
    with pytest.raises(PlanError, match="plan '/dev/zero': it holds more than 2 MB"):
        plan.read_plan(ENDLESS)


def test_the_limit_itself(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 9)
    assert read_bytes(path, 9) == b"x" * 9
    with pytest.raises(OSError, match="it holds more than 0 MB"):
        read_bytes(path, 8)
    assert MAX_NBYTES == 64 * 2**20


@pytest.mark.parametrize("data", [b'{"a": "\xff"}', b"{", b"[" * 100_000, b"\0" * 8])
def test_what_is_no_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"."):
        read_json(path)


def test_nothing_else_in_the_package_reads_whole_files() -> None:
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _reads(node.func)
    }
    assert found == set(ELSEWHERE)


def _reads(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr in ("read_text", "read_bytes")
