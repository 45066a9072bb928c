"""Many requests at once, in a small pool: how many run, how fast, and how long each waits for its first token."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

from compresskv.peers.engines import BLOCK_SIZE, Engine


@dataclass(frozen=True)
class Load:
    """What is asked of an engine."""

    length: int
    """Prompt tokens of each request."""
    pool: int
    """Whole requests, prompt and answer, that the pool holds."""
    num_requests: int
    new_tokens: int

    @property
    def num_blocks(self) -> int:
        """The pool's."""
        return self.pool * math.ceil((self.length + self.new_tokens) / BLOCK_SIZE)


def run_load(engine: Engine, load: Load, text: list[int], budget: int | float | None) -> dict[str, Any]:
    """All requests are there from the beginning; each has another part of the text.

    Args:
        budget: None: plain vLLM.
    """
    stride = max(1, (len(text) - load.length) // load.num_requests)
    with engine.pool_of(load.num_blocks):
        for number in range(load.num_requests):
            engine.add(str(number), text[number * stride : number * stride + load.length], load.new_tokens, budget)
        return _run(engine, load)


def _run(engine: Engine, load: Load) -> dict[str, Any]:
    requests = dict(engine.scheduler.requests)
    started = time.perf_counter()
    first_s: dict[str, float] = {}
    running = []
    while engine.is_busy:
        outputs = engine.step()
        now = time.perf_counter() - started
        running.append(len(engine.scheduler.running))
        for output in outputs:
            first_s.setdefault(output.request_id, now)
    wall_s = time.perf_counter() - started
    return {
        "wall_s": wall_s,
        "requests_per_s": load.num_requests / wall_s,
        "tokens_per_s": load.num_requests * load.new_tokens / wall_s,
        "first_token_s": statistics.mean(first_s.values()),
        "last_first_token_s": max(first_s.values()),
        "max_running": max(running),
        "mean_running": statistics.mean(running),
        "num_steps": len(running),
        "num_preemptions": sum(request.num_preemptions for request in requests.values()),
    }
