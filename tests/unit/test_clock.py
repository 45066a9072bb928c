"""Seconds of a device: at once on a CPU, and on a GPU when its events have passed."""

import time
from typing import Any

import pytest
import torch

from compresskv.system.clock import Clock, Stopwatch, now


def test_a_cpus_seconds_are_noted_at_once() -> None:
    noted: list[tuple[str, float]] = []
    clock = Clock(torch.device("cpu"), lambda name, seconds: noted.append((name, seconds)))
    began = time.perf_counter()
    start = clock.mark()
    time.sleep(0.02)
    clock.between("scoring", start, clock.mark())
    most = time.perf_counter() - began  # however busy the machine is
    ((name, seconds),) = noted
    assert name == "scoring"
    assert 0.02 <= seconds <= most


class Event:
    """In the place of CUDA's: the device passes it when it is told to."""

    made: list["Event"] = []  # noqa: RUF012 - one list for all

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.passed_ms: float | None = None
        self.made.append(self)

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.passed_ms is not None

    def elapsed_time(self, end: "Event") -> float:
        assert self.passed_ms is not None
        assert end.passed_ms is not None
        return end.passed_ms - self.passed_ms


def test_a_gpus_seconds_are_noted_when_it_has_got_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    noted: list[Any] = []
    clock = Clock(torch.device("cuda"), lambda *note: noted.append(note))
    marks = [clock.mark() for _ in range(3)]
    clock.between("scoring", marks[0], marks[1])
    clock.between("compaction", marks[1], marks[2])
    clock.settle()
    assert not noted
    Event.made[0].passed_ms, Event.made[1].passed_ms = 1000.0, 3000.0
    clock.settle()
    assert noted == [("scoring", 2.0)]
    Event.made[2].passed_ms = 3500.0
    clock.settle()
    clock.settle()
    assert noted == [("scoring", 2.0), ("compaction", 0.5)]


def test_seconds_of_several_gpus_wait_for_all_and_are_those_of_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    Event.made.clear()
    devices = torch.device("cuda", 0), torch.device("cuda", 1)
    now(*devices)
    assert waited == list(devices)
    watch = Stopwatch(*devices)
    for _ in range(2):
        with watch.running():
            pass
    for event, passed_ms in zip(Event.made, [0, 0, 100, 3000, 5000, 5000, 6000, 5200], strict=True):
        event.passed_ms = passed_ms
    assert watch.seconds == 3.0 + 1.0
    assert waited == [*devices, *devices]
