"""Time on a device, in seconds: waited for, or between moments that the device passes by itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


def synchronize(*devices: torch.device) -> None:
    """Wait until the devices have done what they were given; a CPU always has."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


def now(*devices: torch.device) -> float:
    """Seconds, once the devices, which should be all that a model lies on, have done what they were given."""
    synchronize(*devices)
    return time.perf_counter()


def mark(device: torch.device) -> Any:
    """This moment in the order of what the device is told to do; nothing waits for it (CUDA events)."""
    if device.type != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Any, end: Any) -> float:
    """Seconds between two marks, which the device must have passed."""
    return float(end - start) if isinstance(start, float) else float(start.elapsed_time(end)) / 1000


@dataclass
class Clock:
    """Notes seconds between marks as soon as they are known, without waiting for the device."""

    device: torch.device
    note: Callable[[str, float], None]
    """Is told a name and its seconds."""
    _pending: list[tuple[str, Any, Any]] = field(default_factory=list)

    def mark(self) -> Any:
        """This moment in the order of what the device is told to do."""
        return mark(self.device)

    def between(self, name: str, start: Any, end: Any) -> None:
        """Note the seconds between two marks: now, or at a `settle` after the device has passed them."""
        self._pending.append((name, start, end))
        self.settle()

    def settle(self) -> None:
        """Note what the device has finished. Cheap where nothing is open."""
        while self._pending and (isinstance(self._pending[0][2], float) or self._pending[0][2].query()):
            name, start, end = self._pending.pop(0)
            self.note(name, between(start, end))


class Stopwatch:
    """Sums the time of what runs under it, and counts how often. Nothing waits for a device until the sum is read.

    Of several devices that one counts, each time, which takes longest.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices
        self._marks: list[list[tuple[Any, Any]]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note the time of what is done inside."""
        starts = [mark(device) for device in self._devices]
        try:
            yield
        finally:
            self._marks.append([(start, mark(own)) for start, own in zip(starts, self._devices, strict=True)])

    @property
    def num_runs(self) -> int:
        """How often it ran so far."""
        return len(self._marks)

    @property
    def seconds(self) -> float:
        """Of all so far; waits for the devices."""
        synchronize(*self._devices)
        return sum((max(between(start, end) for start, end in run) for run in self._marks), 0.0)
