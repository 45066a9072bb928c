"""One request alone: what eviction takes of its prefill, and what decoding costs behind it."""

import statistics
import time
from itertools import pairwise
from typing import Any

from compresskv.serving.bench.engine import Engine
from compresskv.serving.counters import counters

_NEW_TOKENS = 33


def run_single(plain: Engine, compressed: Engine, text: list[int], length: int, budget: int, repeats: int) -> list[Any]:
    """In each round: plain vLLM, the cut prompt, and plain vLLM after a prompt of just the budget's length."""
    rows = []
    for number in range(repeats + 1):  # the first warms up
        contenders = [(plain, length, None), (compressed, length, budget), (plain, budget, None)]
        for engine, num_tokens, own in contenders if number % 2 else reversed(contenders):
            row = _measure(engine, text[:num_tokens], own)
            if number:
                rows.append(row | {"round": number})
    return rows


def _measure(engine: Engine, token_ids: list[int], budget: int | None) -> dict[str, Any]:
    before = _evicting_s()
    engine.add("single", token_ids, _NEW_TOKENS, budget)
    started = time.perf_counter()
    times = []
    while engine.is_busy:
        if engine.step():
            times.append(time.perf_counter() - started)
    steps = [after - before for before, after in pairwise(times)]
    return {
        "kind": "single",
        "length": len(token_ids),
        "budget": budget,
        "prefill_s": times[0],
        "eviction_s": _evicting_s() - before,
        "decode_ms": 1000 * statistics.median(steps),
    }


def _evicting_s() -> float:
    return counters().total("scoring_seconds") + counters().total("compaction_seconds")
