"""The parts of `scripts/check-gpu`: each is given its task, and tells what it finds as it comes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import Part
from compresskv.bench.config import BenchConfig, our_stages
from compresskv.bench.contender import PLAIN, Contender, Ours, Plain
from compresskv.bench.continuation import PeakGrowth
from compresskv.bench.geometry import random_profile
from compresskv.bench.limits import measure_limits
from compresskv.bench.machine import machine
from compresskv.bench.peers import find_peer, measure_peer
from compresskv.bench.run import Bench
from compresskv.bench.subject import Subject, random_subject
from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.models.load import torch_device
from compresskv.models.place import devices_of
from compresskv.system import memory
from compresskv.system.clock import now
from compresskv.system.libraries import versions

Task = dict[str, Any]
Tell = Callable[[Mapping[str, Any]], None]

_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_COUNT = re.compile(r"(\d+) (passed|failed|error|skipped)")
_MOST_FAILURES = 100


def starts(task: Task, tell: Tell) -> Mapping[str, Any]:
    """The machine, its limits, and the versions."""
    device = torch_device(task["device"])
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"machine": machine(device), "versions": versions(), "limits": asdict(measure_limits(device, dtype))}


def contract(task: Task, tell: Tell) -> Mapping[str, Any]:
    """The contract tests on the device, those of a fixed sample; how many passed, and which did not."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=no", "--every"]
    command += [str(task["every"]), "--deadline", str(task["deadline_s"]), *task["tests"]]
    environment = {**os.environ, "COMPRESSKV_TEST_DEVICE": task["device"], "PYTHONPATH": _paths()}
    ran = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False)
    counts = {name: int(count) for count, name in _COUNT.findall(ran.stdout.rsplit("\n", 2)[-2] if ran.stdout else "")}
    if not counts:
        raise RuntimeError(ran.stdout[-1000:] + ran.stderr[-1000:])
    return {**counts, "failures": _FAILED.findall(ran.stdout)[:_MOST_FAILURES]}


def _paths() -> str:
    root = Path(__file__).parents[2]
    return os.pathsep.join([str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])


def table(task: Task, tell: Tell) -> Mapping[str, Any]:
    """The rows of `compresskv bench`, by compiled steps, a length after another."""
    subject = _subject(task)
    config = BenchConfig(tuple(task["lengths"]), (task["budget"],), False, 1, task["new_tokens"], (task["decode"],))
    bench = Bench(subject, config)
    stages = [one for one in our_stages(config, _methods(subject, task["methods"])) if one.length in task["lengths"]]
    bench.run(stages, lambda *_: None, on_rows=lambda: tell(_without_settings(bench.result())))
    return _without_settings(bench.result())


def _without_settings(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name in ("model", "limits", "notes", "rows")}


def bounded(task: Task, tell: Tell) -> Mapping[str, Any]:
    """Read a long prompt with PyTorch's allocator limited to so many bytes, weights and all, and go on from it."""
    device, limit = torch_device(task["device"]), task["limit_nbytes"]
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    subject = _subject(task)
    (one,) = _contenders(subject, task)
    memory.reset_peak(device)
    session = one.start(subject.model, subject.read_tokens(task["length"]))
    found = {
        "limit_nbytes": limit if device.type == "cuda" else None,
        "weights_nbytes": sum(weight.nbytes for weight in subject.model.parameters()),
        "prefill_s": session.prefill.prefill_s,
        "kv_nbytes": session.prefill.kv_nbytes,
        "peak_nbytes": memory.peak_nbytes(device),
    }
    tell(found)
    steps = session.decode(task["new_tokens"] - 1, *devices_of(subject.model))
    return found | {"decode_ms": 1e3 * sorted(steps)[len(steps) // 2], "peak_nbytes": memory.peak_nbytes(device)}


def end_to_end(task: Task, tell: Tell) -> Mapping[str, Any]:
    """Seconds and peak memory from a prompt to the last of its generated tokens, a length after another."""
    subject = _subject(task)
    (one,) = _contenders(subject, task)
    devices, rows = devices_of(subject.model), list[dict[str, Any]]()
    one.start(subject.model, subject.read_tokens(128)).decode(2, *devices)
    for length in task["lengths"]:
        tokens = subject.read_tokens(length)
        with PeakGrowth(subject.model.device) as growth:
            start = now(*devices)
            session = one.start(subject.model, tokens)
            session.decode(task["new_tokens"] - 1, *devices)
            total_s = now(*devices) - start
        rows.append(
            {
                "length": length,
                "method": one.method,
                "total_s": total_s,
                "prefill_s": session.prefill.prefill_s,
                "peak_growth_nbytes": growth.nbytes,
                "new_tokens": task["new_tokens"],
                "not_compiled": session.not_compiled(),
            }
        )
        tell({"rows": rows})
        del session
    return {"rows": rows}


def peers(task: Task, tell: Tell) -> Mapping[str, Any]:
    """kvpress beside, in its own environment."""
    try:
        python = find_peer("kvpress", task["geometry"], random=True)
    except ConfigError as error:
        return {"absent": str(error)}
    subject = _subject(task)
    config = BenchConfig(tuple(task["lengths"]), (task["budget"],), False, 1, task["new_tokens"])
    rows = []
    for row in measure_peer("kvpress", python, subject, config, [], lambda *_: None):
        rows.append(row)
        tell({"rows": rows})
    return {"rows": rows}


PARTS: dict[str, Part] = {
    "starts": starts,
    "contract": contract,
    "table": table,
    "bounded": bounded,
    "end_to_end": end_to_end,
    "peers": peers,
}


def _subject(task: Task) -> Subject:
    most = max(task.get("lengths", [task.get("length", 0)])) + task["new_tokens"]
    return random_subject(task["geometry"], None, most, dtype=task["dtype"], device=task["device"], whole=True)


def _methods(subject: Subject, names: Sequence[str]) -> dict[str, Method]:
    profile = random_profile(subject.model)
    plain = {name: prepare_method(subject.model, name, profile if name in _needing() else None) for name in names}
    return dict(plain)


def _needing() -> set[str]:
    from compresskv.methods.registry import methods

    return {name for name, kind in methods().items() if kind.needs_profile}


def _contenders(subject: Subject, task: Task) -> list[Contender]:
    if task["method"] == PLAIN:
        return [Plain()]
    own = _methods(subject, [task["method"]])
    return [Ours(name, method, task["budget"], decode=task["decode"]) for name, method in own.items()]
