"""Time on a device, in seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Sums the time of what runs under it, and counts how often. On a GPU by events, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note the time of what is done inside."""
        start = self._mark()
        try:
            yield
        finally:
            self._marks.append((start, self._mark()))

    @property
    def num_runs(self) -> int:
        """How often it ran so far."""
        return len(self._marks)

    @property
    def seconds(self) -> float:
        """Of all so far; waits for the device."""
        if self._device.type != "cuda":
            return float(sum(end - start for start, end in self._marks))
        torch.cuda.synchronize(self._device)
        return float(sum(start.elapsed_time(end) for start, end in self._marks)) / 1000

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
