"""What only one process at a time may do, where the others wait for it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, waiting: str, report: Callable[[str, float | None], None]) -> Iterator[None]:
    """Hold the lock file `path`.

    Args:
        waiting: is reported where another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report(waiting, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
