"""A temporary folder for as long as this process lives. What a killed process left is removed by the next one."""

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "compresskv-counters-"
_LOCK = "in-use"


def make_scratch() -> Path:
    """A folder of this process's own, after removing those whose process is gone."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*"):
        _remove_unused(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    # Held to the end of this process, and of those forked from it: the system lets go of it, however they end.
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = folder.rename(parent / folder.name.removeprefix("."))  # others look at it only now that it is locked
    atexit.register(_remove_own, folder, os.getpid())
    return folder


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no process holds; another user's is left alone."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _remove_own(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
