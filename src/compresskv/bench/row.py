"""A contender's figures at one length: medians over rounds, ratios within rounds."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from compresskv.bench.contender import Contender
from compresskv.bench.limits import Limits
from compresskv.bench.rounds import Sample
from compresskv.selection.budgets import SharedBudget


@dataclass(frozen=True)
class Row:
    """One line of the result. Seconds end in `_s`, milliseconds in `_ms`, bytes are `nbytes`.

    Ratios are medians, over rounds, of this contender's figure divided by plain transformers' in the same round; None
    where there is nothing to divide by.
    """

    engine: str
    """'transformers' for plain, 'compresskv', or a peer's name."""
    method: str
    decode: str
    """'eager', 'compiled' or 'int8' (compiled, with 8-bit weights)."""
    not_compiled: str | None
    """Why its tokens were generated eagerly all the same."""
    budget: SharedBudget | None
    length: int
    """As asked for."""
    prompt_tokens: int
    held_tokens: float
    within_budget: bool
    """Whether the prompt is no longer than the budget, so that there is nothing to gain."""
    prefill_s: float
    scoring_s: float | None
    eviction_s: float
    num_scorings: int | None
    first_token_s: float
    decode_ms: float
    """A token, median over the steps of all rounds."""
    kv_nbytes: int
    peak_nbytes: int | None
    prefill_ratio: float | None
    first_token_ratio: float | None
    decode_ratio: float | None
    decode_ratio_short: float | None
    """To plain transformers after a prompt of `budget` tokens, which holds as much."""
    kv_ratio: float | None
    peak_ratio: float | None
    prefill_flop: int
    """That reading the prompt takes."""
    decode_nbytes: int
    """That a decode step must read: weights and KV cache."""
    rounds: list[dict[str, float]]
    """Of each round its prefill_s and the median of its decode_ms."""

    def to_dict(self, limits: Limits) -> dict[str, Any]:
        """For JSON, with the least times that the limits allow and how far the row is from them."""
        least_prefill_s = self.prefill_flop / limits.matmul_flop_per_s
        least_decode_ms = 1000 * self.decode_nbytes / limits.read_bytes_per_s
        return {
            **asdict(self),
            "least_prefill_s": least_prefill_s,
            "least_decode_ms": least_decode_ms,
            "prefill_to_least": self.prefill_s / least_prefill_s,
            "decode_to_least": self.decode_ms / least_decode_ms,
        }


def make_row(
    contender: Contender,
    samples: Sequence[Sample],
    plain: Sequence[Sample],
    short: Sequence[Sample] | None,
    **given: Any,
) -> Row:
    """Sum samples up.

    Args:
        samples, plain, short: one a round, of the contender, of plain transformers on the same prompt, and of plain
            transformers on a prompt of `budget` tokens; None: not measured.
        given: the fields that do not come from samples.
    """
    prefills = [sample.prefill for sample in samples]
    scorings = [one.scoring_s for one in prefills if one.scoring_s is not None]
    peaks = [one.peak_nbytes for one in prefills if one.peak_nbytes is not None]
    return Row(
        method=contender.method,
        decode=contender.decode,
        not_compiled=samples[-1].not_compiled,
        budget=contender.budget,
        prompt_tokens=prefills[0].prompt_tokens,
        held_tokens=prefills[0].held_tokens,
        prefill_s=median(one.prefill_s for one in prefills),
        scoring_s=median(scorings) if scorings else None,
        eviction_s=median(one.eviction_s for one in prefills),
        num_scorings=prefills[0].num_scorings,
        first_token_s=median(one.first_token_s for one in prefills),
        decode_ms=1000 * median(step for sample in samples for step in sample.steps_s),
        kv_nbytes=prefills[0].kv_nbytes,
        peak_nbytes=int(median(peaks)) if peaks else None,
        prefill_ratio=_ratio(samples, plain, lambda one: one.prefill.prefill_s),
        first_token_ratio=_ratio(samples, plain, lambda one: one.prefill.first_token_s),
        decode_ratio=_ratio(samples, plain, _step_s),
        decode_ratio_short=None if short is None else _ratio(samples, short, _step_s),
        kv_ratio=_ratio(samples, plain, lambda one: one.prefill.kv_nbytes),
        peak_ratio=_ratio(samples, plain, lambda one: one.prefill.peak_nbytes),
        rounds=[{"prefill_s": one.prefill.prefill_s, "decode_ms": 1000 * _step_s(one)} for one in samples],
        **given,
    )


def _step_s(sample: Sample) -> float:
    return median(sample.steps_s)


def _ratio(own: Sequence[Sample], other: Sequence[Sample], figure: Callable[[Sample], float | None]) -> float | None:
    """The median over rounds of the ratio within each; None where a round has nothing to divide by."""
    pairs = [(figure(one), figure(two)) for one, two in zip(own, other, strict=True)]
    ratios = [one / two for one, two in pairs if one is not None and two]
    return median(ratios) if ratios else None
