"""A temporary folder for as long as this process lives. What a killed process left is removed by the next one."""

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from compresskv.system.paths import exists

_PREFIX = "compresskv-counters-"
_MARK = "made-by-compresskv"  # folders without it are somebody else's
_MAKING_S = 60.0  # a folder that has not got its name for so long never will


def make_scratch() -> Path:
    """A folder of this process's own, after removing those whose process is gone."""
    parent = Path(tempfile.gettempdir())
    for left in (*parent.glob(f"{_PREFIX}*"), *parent.glob(f".{_PREFIX}*")):
        if _is_ours(left):
            _remove_unused(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    (folder / _MARK).touch()
    # The folder itself is locked, which also keeps systemd-tmpfiles from it. Held to the end of this process, and of
    # those forked from it: the system lets go of it, however they end.
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # a file system without locks: nobody else can lock it either, so nobody removes it
        fcntl.flock(lock, fcntl.LOCK_EX)
    folder = folder.rename(parent / folder.name.removeprefix("."))  # others look at it only now that it is locked
    atexit.register(_remove_own, folder, os.getpid())
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether it was made here, and not just now by a process that has yet to name it."""
    try:
        if folder.name.startswith("."):
            return time.time() - folder.stat().st_mtime > _MAKING_S
        return exists(folder / _MARK)
    except OSError:  # another user's
        return False


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no process holds; another user's is left alone."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # it is held, or the file system has no locks, where nobody knows
    finally:
        os.close(lock)


def _remove_own(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
