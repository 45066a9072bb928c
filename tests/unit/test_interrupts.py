"""Ctrl-C, pressed more than once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from compresskv.cli.chat import _editor, _interruptible, _lines
from compresskv.system.interrupts import ended_once, hear_again, interrupted_once


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


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("later", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_after_one_that_was_handled_the_next_is_heard(later: str) -> None:
    number = getattr(signal, later)

    def work() -> None:
        with ended_once():
            for _ in range(3):
                try:
                    signal.raise_signal(signal.SIGINT)
                    heard = False
                except KeyboardInterrupt:
                    hear_again()
                    heard = True
                assert heard
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt if later == "SIGINT" else SystemExit):
        work()


def test_interrupts_at_the_prompt_of_a_conversation_drop_lines_and_leave_signals_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = iter([None, "one", None, None, "two", EOFError()])

    def read_line() -> str:
        if (line := next(typed)) is None:
            signal.raise_signal(signal.SIGINT)
        if isinstance(line, EOFError):
            raise line
        return str(line)

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("compresskv.cli.chat._editor", lambda: read_line)
    with ended_once():
        assert list(_lines()) == ["one", "two"]
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # prompt_toolkit's own, of event loops
def test_lines_are_edited_and_earlier_ones_come_back() -> None:
    left, up, enter, end = "\x1b[D", "\x1b[A", "\r", "\x04"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read_line = _editor()
        keys.send_text(f"Wo?{left}{left}h{enter}")
        assert read_line() == "Who?"

        def go_back() -> None:
            for _ in range(10):  # earlier lines are there a moment after the prompt; above the first one is none
                time.sleep(0.05)
                keys.send_text(up)
            keys.send_text(f" Where?{enter}{end}")

        back = threading.Thread(target=go_back)
        back.start()
        assert read_line() == "Who? Where?"
        back.join()
        with pytest.raises(EOFError):
            read_line()


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM"])
def test_what_ends_an_answer_and_the_process_is_heard_once(ending: str) -> None:
    done = []

    def work() -> None:
        with ended_once():
            try:
                with _interruptible() as is_stopped:
                    if ending == "SIGINT":
                        signal.raise_signal(signal.SIGINT)
                        assert is_stopped()
                    signal.raise_signal(getattr(signal, ending))
            finally:
                signal.raise_signal(signal.SIGINT)
                done.append("what was left to remove")

    with pytest.raises(KeyboardInterrupt if ending == "SIGINT" else SystemExit):
        work()
    assert done


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_two_that_come_at_once_are_one(capfd: pytest.CaptureFixture[str]) -> None:
    both = [signal.SIGINT, signal.SIGTERM]

    def work() -> None:
        with ended_once():
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            try:
                for one in both:
                    os.kill(os.getpid(), one)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        work()
    assert "race condition" not in capfd.readouterr().err
