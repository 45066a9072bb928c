"""Loading is silent, and nobody else notices."""

import logging
import threading
from collections.abc import Iterator

import huggingface_hub.utils
import pytest
import transformers.utils

from compresskv.system.quiet import quiet

LOGS = transformers.utils.logging


@pytest.fixture(autouse=True)
def bars() -> Iterator[None]:
    """On in each test, and afterwards as before."""
    before = LOGS.is_progress_bar_enabled(), not huggingface_hub.utils.are_progress_bars_disabled()
    LOGS.enable_progress_bar()
    yield
    (LOGS.enable_progress_bar if before[0] else LOGS.disable_progress_bar)()
    (huggingface_hub.utils.enable_progress_bars if before[1] else huggingface_hub.utils.disable_progress_bars)()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers' own handler writes."""
    LOGS.get_verbosity()
    lines: list[str] = []
    handler = logging.getLogger("transformers").handlers[0]
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    return lines


def state() -> tuple[int, bool, bool]:
    return (
        LOGS.get_verbosity(),
        LOGS.is_progress_bar_enabled(),
        not huggingface_hub.utils.are_progress_bars_disabled(),
    )


def test_messages_of_this_thread_are_kept_back(shown: list[str]) -> None:
    logger = LOGS.get_logger("transformers.some.module")
    with quiet():
        with quiet():
            logger.warning("inner")
        logger.warning("outer")
    logger.warning("after")
    assert shown == ["after"]


def test_other_threads_are_heard_and_verbosity_stays(shown: list[str]) -> None:
    before = LOGS.get_verbosity()
    with quiet():
        assert LOGS.get_verbosity() == before
        other = threading.Thread(target=lambda: LOGS.get_logger("transformers.other").warning("from beside"))
        other.start()
        other.join()
    assert shown == ["from beside"]


@pytest.mark.parametrize("downloads", [False, True])
def test_bars_are_off_until_the_last_thread_has_left(downloads: bool) -> None:
    """Two loads that overlap, of which the first to begin is the first to end."""
    before, seen = state(), []
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with quiet(downloads=downloads):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=second)
    with quiet(downloads=downloads):
        thread.start()
        assert entered.wait(10)
    seen.append(state())
    leave.set()
    thread.join()
    assert seen == [(before[0], False, downloads)]
    assert state() == before
