"""Ctrl-C where results must still be shown and stored."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupted_once() -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt, as ever; later ones do nothing until the `with` has ended.

    `timeout -s INT`, and people in a hurry, send two: the second must not end what the first one left to be written.
    Outside of the main thread, which alone is interrupted, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def once(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
