"""What is told of the candidates that layers held while a prompt was read."""

from dataclasses import dataclass

from compresskv import defaults
from compresskv.cache.eviction import Eviction
from compresskv.selection.budgets import is_auto


@dataclass(frozen=True)
class CandidateStats:
    """How much layers held that waited for later ones, in place of the whole prompt."""

    factor: int
    """Times their budget; see `candidates` of `compressing`."""
    num_layers: int
    """That freed the rest of the prompt before all layers were read."""
    most_held: int | None
    """Tokens that a KV head of these held then; None where there were none."""
    note: str | None
    """Why there were none."""


def candidate_stats(
    eviction: Eviction, asked: int | None, num_prompt: int, *, decides_later: bool
) -> CandidateStats | None:
    """What is to be told; None where the whole prompt was asked for, or where the default made no difference.

    Args:
        asked: see `compressing`.
        decides_later: whether answers are cut by a method that decides for all layers together.
    """
    held = eviction.num_candidates
    if asked is None or (asked == defaults.CANDIDATES and not held):
        return None
    if held:
        return CandidateStats(asked, len(held), max(held), None)
    why = _why_none(eviction, num_prompt, decides_later=decides_later)
    return CandidateStats(asked, 0, None, f"candidates={asked} had no effect: {why}")


def _why_none(eviction: Eviction, num_prompt: int, *, decides_later: bool) -> str:
    method = eviction.method
    reasons = {
        "what stays was chosen in a first reading, which is exact": method.brings_budget,
        f"method {method.label!r} keeps everything": not method.evicts,
        f"method {method.label!r} decides layer by layer": not method.decides_together,
        "prompts that are cut in chunks hold no more than these": eviction.conditions.chunks is not None,
        "what stays of a prompt that decides its budget is not known before its end": is_auto(eviction.budget),
        "the method that cuts the answer needs the same tokens in all layers": decides_later,
        f"method {method.label!r} cannot tell before all layers are read": not eviction.foresees,
        f"the prompt of {num_prompt:,} tokens is not long enough for it": True,
    }
    return next(reason for reason, holds in reasons.items() if holds)
