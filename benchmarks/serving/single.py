"""One request alone: what eviction takes of its prefill, and what decoding costs behind it."""

import statistics
import time
from itertools import pairwise

from compresskv.peers.engines import Engine
from compresskv.serving.counters import counters

_NEW_TOKENS = 33


def run_round(
    plain: Engine, compressed: Engine, text: list[int], length: int, budget: int, number: int
) -> dict[str, dict[str, float]]:
    """Plain vLLM, the cut prompt, and plain vLLM after a prompt of just the budget's length, in turn.

    Args:
        number: the round's; every second one goes through them backwards.
    """
    contenders = {"plain": (plain, length, None), "cut": (compressed, length, budget), "short": (plain, budget, None)}
    names = list(contenders)[:: 1 if number % 2 else -1]
    return {name: _measure(contenders[name][0], text[: contenders[name][1]], contenders[name][2]) for name in names}


def _measure(engine: Engine, token_ids: list[int], budget: int | None) -> dict[str, float]:
    before = _evicting_s()
    engine.forget()
    engine.add("single", token_ids, _NEW_TOKENS, budget)
    started = time.perf_counter()
    times = []
    while engine.is_busy:
        if engine.step():
            times.append(time.perf_counter() - started)
    steps = [after - before for before, after in pairwise(times)]
    return {
        "prefill_s": times[0],
        "eviction_s": _evicting_s() - before,
        "decode_ms": 1000 * statistics.median(steps),
    }


def _evicting_s() -> float:
    return counters().total("scoring_seconds") + counters().total("compaction_seconds")
