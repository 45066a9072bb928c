"""Ctrl-C and other signals to end, where results must still be shown and stored, and temporary files removed."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # of which a system may lack some
_arming: list[Callable[[], None]] = []  # of each `with` that is open, the innermost last


@contextmanager
def interrupted_once() -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt, as ever; later ones do nothing until the `with` has ended.

    `timeout -s INT`, and people in a hurry, send two: the second must not end what the first one left to be written.
    Outside of the main thread, which alone is interrupted, nothing changes.
    """
    with _raised_once([signal.SIGINT]):
        yield


@contextmanager
def ended_once(*, until_exit: bool = False) -> Iterator[None]:
    """`interrupted_once`; and a process that is told to end does so like one that is interrupted, cleaning up.

    SIGTERM and SIGHUP are a SystemExit with the code of the shells, 128 and the signal's number. What the process was
    started to ignore, as by nohup, it goes on ignoring.

    Args:
        until_exit: whether Ctrl-C stays unheard behind the `with` where a signal ended it: the process ends, too.
    """
    known = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    with _raised_once(
        [one for one in known if one == signal.SIGINT or signal.getsignal(one) == signal.SIG_DFL], until_exit
    ):
        yield


def hear_again() -> None:
    """The KeyboardInterrupt was caught, and work goes on: the next signal is heard as the first one was."""
    if _arming and threading.current_thread() is threading.main_thread():
        _arming[-1]()


@contextmanager
def _raised_once(signals: Sequence[signal.Signals], until_exit: bool = False) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def once(number: int, _frame: FrameType | None) -> None:
        for one in signals:
            signal.signal(one, _unheard)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def arm() -> None:
        for one in signals:
            signal.signal(one, once)

    before = {one: signal.getsignal(one) for one in signals}
    arm()
    _arming.append(arm)
    try:
        yield
    finally:
        _arming.remove(arm)
        ended = signal.getsignal(signal.SIGINT) in (_unheard, signal.SIG_IGN)
        for one, handler in before.items():
            # what was ended inside of another such `with` ends that one, too
            if not (ended and one == signal.SIGINT and (until_exit or _arming)):
                signal.signal(one, handler)
            elif until_exit:  # Python forgets functions on its way out
                signal.signal(one, signal.SIG_IGN)


def _unheard(_number: int, _frame: FrameType | None) -> None:
    """Ignore it. Of a signal that came but was not handled yet, Python complains where it is to be ignored by then."""
