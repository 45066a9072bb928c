"""Keep transformers and the hub client off the terminal while we load."""

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

_TALKATIVE = ("torchao", "torch.utils._pytree")
_LIBRARIES = ("transformers", "huggingface_hub")
_RETRY = re.compile(r"([\d.]+) ?s\b.*\[Retry (\d+)/(\d+)\]")
"""The hub client's word of another try, and the seconds until then."""
_here = threading.local()
"""`depth`: how many `quiet` this thread is in; `on_retry`: who is told of retries."""


def hush_torchao() -> None:
    """Keep torchao off the terminal: transformers imports it, and it tells of others' kernels."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet(*, downloads: bool = False, on_retry: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep transformers' messages and progress bars off the terminal inside the `with`.

    Messages of other threads are shown as ever, and verbosity stays what the caller made it. Progress bars can only be
    switched for the whole process: they are as they were once the last thread has left.

    Args:
        downloads: leave the progress bars of the hub's downloads as they are.
        on_retry: told, in place of the terminal, that the hub does not answer and is asked again.
    """
    _library_logs().get_verbosity()  # makes transformers' handler, if nothing was told yet
    for name in _LIBRARIES:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_heard)  # once, however often it is added
    _here.depth = getattr(_here, "depth", 0) + 1
    before, _here.on_retry = getattr(_here, "on_retry", None), on_retry
    try:
        with _LOADING_BARS.off(), contextlib.nullcontext() if downloads else _DOWNLOAD_BARS.off():
            yield
    finally:
        _here.depth -= 1
        _here.on_retry = before


def _is_heard(record: logging.LogRecord) -> bool:
    """Whether a library's own handler shows a message: what goes wrong in a `quiet` is raised, and told in one line."""
    if not getattr(_here, "depth", 0) or record.levelno >= logging.CRITICAL:
        return True
    retry = _RETRY.search(record.getMessage())
    if retry is not None and _here.on_retry is not None:
        seconds, number, most = retry.groups()
        _here.on_retry(f"the hub does not answer: try {number} of {most} in {float(seconds):.0f} s")
    return False


class _Switch:
    """Something of the whole process that is off while any thread wants it off, and then as it was."""

    def __init__(self, is_on: Callable[[], bool], turn: Callable[[bool], None]) -> None:
        self._is_on, self._turn = is_on, turn
        self._num_off = 0
        self._was_on = False

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        with _lock:
            if self._num_off == 0:
                self._was_on = self._is_on()
                self._turn(False)
            self._num_off += 1
        try:
            yield
        finally:
            with _lock:
                self._num_off -= 1
                if self._num_off == 0:
                    self._turn(self._was_on)


_lock = threading.Lock()


def _shows_loading() -> bool:
    return bool(_library_logs().is_progress_bar_enabled())


def _show_loading(on: bool) -> None:
    downloads = _shows_downloads()
    (_library_logs().enable_progress_bar if on else _library_logs().disable_progress_bar)()
    _show_downloads(downloads)  # transformers switches the hub's with its own


def _library_logs() -> Any:
    import transformers.utils

    return transformers.utils.logging


def _shows_downloads() -> bool:
    return not _hub().are_progress_bars_disabled()


def _show_downloads(on: bool) -> None:
    if on != _shows_downloads():  # switching against the hub's environment variable would be warned of
        (_hub().enable_progress_bars if on else _hub().disable_progress_bars)()


def _hub() -> Any:
    import huggingface_hub.utils

    return huggingface_hub.utils


_LOADING_BARS = _Switch(_shows_loading, _show_loading)
_DOWNLOAD_BARS = _Switch(_shows_downloads, _show_downloads)
