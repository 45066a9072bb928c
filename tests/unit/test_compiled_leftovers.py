"""A killed build of a compiled step leaves a folder behind, which the next build of any step removes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from compresskv.compiled import package


def leftover(parent: Path, step: str) -> Path:
    folder = parent / f".{step}.0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "step.pt2").write_bytes(b"half")
    return folder


def test_the_next_build_removes_them_but_not_what_is_being_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "compiled"
    killed = [leftover(parent, "llama-00"), leftover(parent, "llama-11"), leftover(parent, "glm4.5-22")]
    running, finished = leftover(parent, "qwen3-33"), parent / "qwen3-44"
    finished.mkdir()
    seen: list[list[Path]] = []

    def build(model: Any, kinds: Any, folder: Path) -> None:
        seen.append([path for path in killed if path.exists()])

    monkeypatch.setattr(package, "_build", build)
    monkeypatch.setattr(package, "build_times", lambda *_: None)
    monkeypatch.setattr(package, "Package", lambda *_: SimpleNamespace())
    model: Any = None
    with FileLock(parent / "qwen3-33.lock"):
        package._build_alone(model, (), parent / "llama-00", lambda *_: None)
    assert seen == [[]]
    assert running.is_dir()
    assert finished.is_dir()
