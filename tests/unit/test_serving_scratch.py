"""The counters' folder: its own process's for as long as that lives, and nobody's afterwards."""

import errno
import fcntl
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
    others = tmp_path / "compresskv-counters-of-somebody"  # without the mark: not made here
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


def test_one_that_never_got_its_name_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = tmp_path / ".compresskv-counters-old", tmp_path / ".compresskv-counters-new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    own = make_scratch()
    assert sorted(tmp_path.iterdir()) == sorted([own, new])  # another process may be making that one just now


def test_the_folder_itself_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what systemd-tmpfiles looks at."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = os.open(make_scratch(), os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows which folders are held, so all of them stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def flock(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    first = make_scratch()
    second = make_scratch()
    assert first.is_dir()
    assert second.is_dir()


def test_it_goes_with_its_process(tmp_path: Path) -> None:
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, input="\n", text=True, check=True)
    assert not list(tmp_path.iterdir())
