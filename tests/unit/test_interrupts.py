"""Ctrl-C, pressed more than once."""

import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from compresskv.system.interrupts import ended_once, interrupted_once


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals are heard, as on a terminal: a process in the background may have been told to ignore them."""
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    for name in ("SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            before[number] = signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_is_heard_and_later_ones_are_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []

    def work() -> None:
        with interrupted_once():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                done.append("what was left to write")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_in_another_thread_nothing_changes() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with interrupted_once():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("first", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_whatever_ends_a_process_lets_it_clean_up(first: str, second: str) -> None:
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGHUP", "SIGINT")}
    done = []

    def work() -> None:
        with ended_once():
            try:
                signal.raise_signal(getattr(signal, first))
            finally:
                signal.raise_signal(getattr(signal, second))
                done.append("what was left to remove")

    with pytest.raises(KeyboardInterrupt if first == "SIGINT" else SystemExit) as ended:
        work()
    assert done
    if first != "SIGINT":
        assert ended.value.args == (128 + getattr(signal, first),)
    assert before == {name: signal.getsignal(getattr(signal, name)) for name in before}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_once():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
