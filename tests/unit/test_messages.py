"""Messages name parameters as their reader does: Python's callers as in Python, those who type a command as typed."""

import ast
import re
from pathlib import Path

import pytest

import compresskv
from commands import commands

ROOT = Path(compresskv.__file__).parent
COMMANDS = ("cli", "serving")  # vLLM's own options are told there
OTHER_PROGRAMS = {"models/download.py", "peers/process.py", "peers/answers.py"}  # pip's options, and a peer's process
MODULES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in COMMANDS and path.relative_to(ROOT).as_posix() not in OTHER_PROGRAMS
]


def texts(path: Path) -> list[str]:
    """All texts of a module but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    said = {
        id(node.value)
        for owner in ast.walk(tree)
        if isinstance(owner, documented)
        for node in owner.body
        if isinstance(node, ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_command_line_writes_dashes(path: Path) -> None:
    dashed = [text for text in texts(path) if re.search(r"(?<![\w-])--[a-z]", text)]
    assert dashed == []


def test_parameters_are_named_so_that_commands_can_say_them_as_they_are_typed() -> None:
    """chunk_budget=N becomes --chunk-budget N; a bare chunk_budget would be shown as it is."""
    names = {one.name for _, command in commands() for one in command.params if "_" in one.name}
    bare = re.compile(rf"(?<![\w'.-])({'|'.join(sorted(names))})(?![\w=])")
    found = {
        f"{path.relative_to(ROOT)}: {text}"
        for path in MODULES
        for text in texts(path)
        if " " in text.strip() and "\n" not in text and bare.search(text)
    }
    assert found == set()
