"""Measure vLLM with its full cache: `python -m compresskv.bench.vllm_peer --request FILE`.

It runs in the environment that `scripts/environment-vllm` makes. Each row is one line of JSON on stdout, and so is
progress.
"""

import sys
import time
from dataclasses import fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from compresskv.bench.peer_request import BenchRequest
from compresskv.bench.row import Row
from compresskv.embedded import EMBEDDED, ensure_embedded
from compresskv.errors import ConfigError
from compresskv.evaluation.peer_answers import Write, answer_request
from compresskv.serving.bench.engine import Engine, start_engine


def measure(request: BenchRequest, write: Write) -> None:
    """Read each prompt and generate from it, in rounds.

    Raises:
        ConfigError: random weights, which vLLM cannot be given.
    """
    if request.num_layers is not None:
        raise ConfigError("--peers vllm needs a real model: leave out --random")
    plan = request.to_plan()
    model = str(ensure_embedded(request.model)) if request.model in EMBEDDED else request.model
    engine = start_engine(model, compressed=False, max_model_len=plan.most_tokens, num_blocks=None, dtype=request.dtype)
    _generate(engine, list(request.input_ids[:128]), 4)  # warms up
    for number, length in enumerate(plan.lengths):
        write({"message": f"{length:,} tokens", "fraction": number / len(plan.lengths)})
        rounds = [_generate(engine, list(request.input_ids[:length]), plan.new_tokens) for _ in range(plan.repeats)]
        write(_row(length, rounds))


def _generate(engine: Engine, token_ids: list[int], num_new: int) -> list[float]:
    """Seconds from the start to each token."""
    engine.add("one", token_ids, num_new, None)
    start, seconds = time.perf_counter(), []
    while engine.is_busy:
        if engine.step():
            seconds.append(time.perf_counter() - start)
    return seconds


def _row(length: int, rounds: list[list[float]]) -> dict[str, Any]:
    """With the names of `Row`; what vLLM does not tell is None."""
    row_keys = {one.name for one in fields(Row)} | {"prefill_to_least", "decode_to_least", "least_decode_ms"}
    prefill_s = median(seconds[0] for seconds in rounds)
    steps = [after - before for seconds in rounds for before, after in pairwise(seconds)]
    return {
        **dict.fromkeys(row_keys),
        "engine": "vllm",
        "method": "vllm (eager), full cache",
        "decode": "eager",
        "length": length,
        "prompt_tokens": length,
        "within_budget": False,
        "prefill_s": prefill_s,
        "first_token_s": prefill_s,
        "decode_ms": 1000 * median(steps),
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
    }


def main() -> int:
    """Answer the request on stdout."""
    return answer_request("Measure vLLM; one JSON line for each row.", "BenchRequest", _answer)


def _answer(request: Path, write: Write) -> None:
    measure(BenchRequest.read(request), write)


if __name__ == "__main__":
    sys.exit(main())
