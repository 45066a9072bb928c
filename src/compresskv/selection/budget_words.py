"""How budgets are told: what one may be, in options and errors, and which one was understood, in reports."""

from collections.abc import Sequence

from compresskv.selection.auto_budget import AUTO

TOKENS_KIND = "tokens (256; 1 is one token)"
SHARE_KIND = "a share of the prompt (3%, 0.03; 1.0 is all)"
BYTES_KIND = "bytes in all layers (3MB, or 5% of bytes)"
IN_TOKENS = (TOKENS_KIND, SHARE_KIND)
"""Kinds of budgets, by what can be taken: those that say how many tokens they are,"""
BEFOREHAND = (*IN_TOKENS, BYTES_KIND)
"""those that are known before a prompt is read,"""
ANY = (*BEFOREHAND, AUTO)
"""and all."""
OF_BYTES, OF_ALL_BYTES = "of bytes", "of the full cache's bytes"


def any_of(*kinds: str) -> str:
    """'a, b, or c'."""
    return f"{', '.join(kinds[:-1])}, or {kinds[-1]}"


def note_of(budget: object, num_kept: float, num_prompt: int, window_size: int) -> str | None:
    """What is noted where a budget may not be what was meant.

    Args:
        num_kept: tokens of `num_prompt` that stayed, a mean.
        window_size: those at the prompt's end that the method chooses by, and keeps before all others.
    """
    if budget is None or num_kept >= num_prompt:
        return None
    if budget == 1 and type(budget) is int:
        return "budget=1 is one token: all of the prompt is 1.0, or 100%"
    if num_kept <= window_size:
        end = "1 token" if window_size == 1 else f"{window_size} tokens"
        what = f"budget={budget} is {num_kept:,.0f} of this prompt's {num_prompt:,} tokens"
        return f"{what}, hardly more than its end, {end}, by which the method chooses: give more"
    return None


def in_words(budget: float | str | Sequence[int] | None) -> str:
    """A budget as a reader would say it: 1.0 (all of the prompt) and 1 (token) must not look alike.

    Args:
        budget: None: nothing is evicted.
    """
    if isinstance(budget, str):
        return f"{budget.removesuffix(OF_BYTES)}{OF_ALL_BYTES}" if budget.endswith(OF_BYTES) else budget
    if budget is None or (isinstance(budget, float) and budget == 1):
        return "all of the prompt"
    if isinstance(budget, float):
        return f"{100 * budget:.3g}% of the prompt"
    if isinstance(budget, int):
        return "1 token" if budget == 1 else f"{budget:,} tokens"
    return f"{min(budget):,} to {max(budget):,} tokens, by layer"
