"""Contenders taking turns: what one round measures is compared within that round alone, since machines are noisy."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from compresskv.bench.contender import Contender
from compresskv.bench.continuation import Continuation, PeakGrowth, Prefill
from compresskv.models.place import devices_of

_WARM_UP_TOKENS = 128
_BLOCK = 8
"""Decode steps that a contender takes before it is the next one's turn."""


@dataclass(frozen=True)
class Sample:
    """One contender in one round."""

    prefill: Prefill
    steps_s: tuple[float, ...]
    """Seconds of each decode step."""
    tokens: tuple[int, ...]
    """What it generated, the first token included."""
    not_compiled: str | None = None
    """Why its steps were not compiled though that was asked for."""


def run_rounds(
    model: PreTrainedModel,
    input_ids: Tensor,
    contenders: Sequence[Contender],
    *,
    num_rounds: int,
    num_new_tokens: int,
    on_step: Callable[[], None],
    on_round: Callable[[list[list[Sample]]], None] = lambda _: None,
) -> list[list[Sample]]:
    """Measure the contenders on the prompt (1, T); each reads it in every round, and decodes in turns with the others.

    A first, short prompt warms up and is not counted. Every second round goes in the opposite order.

    Args:
        num_new_tokens: to be generated after each prompt, the first one included.
        on_step: called after each prefill.
        on_round: called after each round with what is returned if it was the last.
    Returns: for each contender, a sample of each round.
    """
    for contender in contenders:
        contender.start(model, input_ids[:, :_WARM_UP_TOKENS]).decode(2, *devices_of(model))
    samples: list[list[Sample]] = [[] for _ in contenders]
    for number in range(num_rounds):
        places = list(range(len(contenders)))
        if number % 2:
            places.reverse()
        for place, sample in _round(model, input_ids, contenders, places, num_new_tokens, on_step).items():
            samples[place].append(sample)
        on_round(samples)
    return samples


def _round(
    model: PreTrainedModel,
    input_ids: Tensor,
    contenders: Sequence[Contender],
    places: list[int],
    num_new_tokens: int,
    on_step: Callable[[], None],
) -> dict[int, Sample]:
    gc.collect()  # what the last round left in cycles must not be freed while this one is timed
    running: dict[int, Continuation] = {}
    for place in places:
        prompt = input_ids[:, : contenders[place].max_prompt]
        with PeakGrowth(model.device) as growth:
            running[place] = contenders[place].start(model, prompt)
        running[place].prefill = replace(running[place].prefill, peak_nbytes=growth.nbytes)
        on_step()
    steps: dict[int, list[float]] = {place: [] for place in places}
    devices = devices_of(model)
    left = num_new_tokens - 1
    while left > 0:
        for place in places:
            steps[place] += running[place].decode(min(_BLOCK, left), *devices)
        left -= _BLOCK
    return {
        place: Sample(one.prefill, tuple(steps[place]), tuple(one.tokens), one.not_compiled())
        for place, one in running.items()
    }
