"""What is measured of other inference engines, with their full caches, by the python of their own environments."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from statistics import median
from typing import Any

from compresskv.bench.peers import BenchRequest
from compresskv.bench.row import Row
from compresskv.errors import ConfigError, first_line
from compresskv.peers.engines import Generator, start_llama_cpp, start_vllm
from compresskv.system.clock import now

_WARM_UP_TOKENS = 128


def answer(request: BenchRequest) -> Iterator[dict[str, Any]]:
    """Load the engine that is asked for, and measure it.

    Raises:
        ConfigError: llama.cpp does not know the model, or the model is on a GPU.
    """
    most = request.config.most_tokens
    if request.peer == "vllm":
        engine = start_vllm(request.model, request.dtype, most)
    elif request.device != "cpu":
        raise ConfigError(f"llama.cpp is measured on CPUs only, and the model is on {request.device}")
    else:
        engine = start_llama_cpp(request.model, request.num_threads, most)
    yield from measure_engine(request, engine)


def measure_engine(request: BenchRequest, engine: Generator) -> Iterator[dict[str, Any]]:
    """Generate from each prompt in rounds: progress, rows, and what failed."""
    config = request.config
    for _ in engine.generate(list(request.input_ids[: min(_WARM_UP_TOKENS, *config.lengths)]), 2):
        pass
    named = {"engine": request.peer, "method": engine.label, "versions": engine.versions, "weights": engine.weights}
    for number, length in enumerate(config.lengths):
        yield {"message": f"{length:,} tokens", "fraction": number / len(config.lengths)}
        prompt = list(request.input_ids[:length])
        try:
            rounds = [_seconds(engine.generate(prompt, config.new_tokens)) for _ in range(config.repeats)]
        except Exception as error:  # noqa: BLE001 - engines raise of all kinds, and other lengths may still work
            yield {"length": length, "error": first_line(error)}
        else:
            yield {**_row(length, rounds), **named}


def _seconds(tokens: Iterator[int]) -> list[float]:
    """From the start to each token."""
    start = now()
    return [now() - start for _ in tokens]


def _row(length: int, rounds: list[list[float]]) -> dict[str, Any]:
    """With the names of `Row`; what engines do not tell is None."""
    keys = {one.name for one in fields(Row)} | {"prefill_to_least", "decode_to_least", "least_decode_ms"}
    prefill_s = median(seconds[0] for seconds in rounds)
    steps = [after - before for seconds in rounds for before, after in pairwise(seconds)]
    return {
        **dict.fromkeys(keys),
        "decode": "eager",
        "length": length,
        "prompt_tokens": length,
        "within_budget": False,
        "prefill_s": prefill_s,
        "first_token_s": prefill_s,
        "decode_ms": 1000 * median(steps),
    }
