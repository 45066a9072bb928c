"""How long the device worked on something, without waiting for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Clock:
    """Seconds between marks: on CPUs as they pass, on GPUs as its stream passes them (CUDA events).

    A GPU is not waited for: what it has not finished yet is noted at a later `settle`.
    """

    device: torch.device
    note: Callable[[str, float], None]
    """Is told a name and its seconds."""
    _pending: list[tuple[str, Any, Any]] = field(default_factory=list)

    def mark(self) -> Any:
        """This moment in the order of what the device is told to do."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, name: str, start: Any, end: Any) -> None:
        """Note the seconds between two marks as soon as they are known."""
        if self.device.type == "cpu":
            self.note(name, end - start)
        else:
            self._pending.append((name, start, end))

    def settle(self) -> None:
        """Note what the device has finished. Cheap where nothing is open."""
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.pop(0)
            self.note(name, start.elapsed_time(end) / 1000)
