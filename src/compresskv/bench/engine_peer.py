"""What is measured of other inference engines, with their full caches, by the python of their own environments."""

import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from compresskv.bench.peer_request import BenchRequest
from compresskv.bench.row import Row
from compresskv.errors import first_line
from compresskv.models.embedded import EMBEDDED
from compresskv.peers.answers import Write

Generate = Callable[[list[int], int], Iterator[int]]
"""Reads a prompt and yields so many tokens, each as soon as it is known."""
_WARM_UP_TOKENS = 128


def model_path(request: BenchRequest, embedded: Callable[[str], Path]) -> str:
    """The model as an engine takes it: a hub id, a folder or a file.

    Args:
        embedded: finds an embedded model by its name.
    """
    return str(embedded(request.model)) if request.model in EMBEDDED else request.model


def measure_engine(
    request: BenchRequest, name: str, label: str, versions: dict[str, str], generate: Generate, write: Write
) -> None:
    """Generate from each prompt in rounds.

    Args:
        name: the engine's.
        label: how its rows are called.
        versions: of the packages that matter.
    """
    plan = request.to_plan()
    for _ in generate(list(request.input_ids[: min(_WARM_UP_TOKENS, *plan.lengths)]), 2):
        pass
    for number, length in enumerate(plan.lengths):
        write({"message": f"{length:,} tokens", "fraction": number / len(plan.lengths)})
        prompt = list(request.input_ids[:length])
        try:
            rounds = [_seconds(generate(prompt, plan.new_tokens)) for _ in range(plan.repeats)]
        except Exception as error:  # noqa: BLE001 - engines raise of all kinds, and other lengths may still work
            write({"length": length, "error": first_line(error)})
            continue
        write({**_row(length, rounds), "engine": name, "method": label, "versions": versions})


def _seconds(tokens: Iterator[int]) -> list[float]:
    """From the start to each token."""
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in tokens]


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
