"""The counters' folder: its own process's for as long as that lives, and nobody's afterwards."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from compresskv.serving.scratch import make_scratch

PROGRAM = "from compresskv.serving.scratch import make_scratch; print(make_scratch(), flush=True); input()"


def test_a_killed_processs_folder_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    start = [sys.executable, "-c", PROGRAM]
    others = tmp_path / "compresskv-counters-of-somebody"  # without a lock: not made here
    others.mkdir()
    with subprocess.Popen(start, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.parent == tmp_path
        own = make_scratch()
        assert folder.is_dir()  # it lives
        process.send_signal(signal.SIGKILL)
    assert folder.is_dir()
    second = make_scratch()
    assert not folder.exists()
    assert sorted(tmp_path.iterdir()) == sorted([own, second, others])


def test_it_goes_with_its_process(tmp_path: Path) -> None:
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, input="\n", text=True, check=True)
    assert not list(tmp_path.iterdir())
