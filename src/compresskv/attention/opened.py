"""What a model is changed by while contexts are open on it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Opened:
    """Counts the contexts open on a thing, of all threads: the first changes it, and the last puts back what was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[int, Callable[[], None]]] = {}

    def __contains__(self, thing: object) -> bool:
        with self._lock:
            return id(thing) in self._open

    @contextmanager
    def on(self, thing: object, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
        """A context on `thing`.

        Args:
            change: changes it, and returns what puts it back; called for the first context. What it raises is raised.
        """
        with self._lock:
            count, undo = self._open.get(id(thing)) or (0, change())
            self._open[id(thing)] = count + 1, undo
        try:
            yield
        finally:
            with self._lock:
                count, undo = self._open.pop(id(thing))
                if count > 1:
                    self._open[id(thing)] = count - 1, undo
                else:
                    undo()
