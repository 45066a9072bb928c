"""Choosing how much of a prompt is kept by what its window's attention would leave uncovered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.predicting import check_predicts
from compresskv.selection.auto_budget import (
    LEAST_TOKENS,
    AutoBudget,
    AutoChoice,
    LossCurve,
    as_typed,
    find_auto_budget,
    rungs,
)
from compresskv.selection.budgets import Budget, SharedBudget, is_auto, parse_budget
from compresskv.selection.scores import mean_over_groups
from compresskv.selection.select import EMPTY_SLOT


@dataclass(frozen=True)
class Automatic:
    """How each prompt decides its budget."""

    allowed: AutoBudget
    ceiling: SharedBudget
    """The most that may be kept."""
    curve: LossCurve

    def keeping_all(self, num_tokens: int) -> AutoChoice:
        """Of a prompt that is too short for anything to go."""
        return AutoChoice(num_tokens, 0.0, 0.0, self.allowed.max_loss, "all")

    def choose(
        self,
        method: Method,
        observed: Sequence[Observation],
        attention: Sequence[Tensor],
        most: Sequence[int],
        row_lengths: list[int],
    ) -> list[AutoChoice]:
        """For each row; see `choose_budgets` and `uncovered`."""
        scores = method.score_layers(observed)
        shares_at = partial(uncovered, method, observed, scores, attention, row_lengths=row_lengths)
        return choose_budgets(shares_at, self.curve, self.allowed.max_loss, LEAST_TOKENS, most, row_lengths)


def automatic(method: Method, budget: Budget, *, cuts_early: bool) -> Automatic | None:
    """How each prompt decides its budget; None where it is known beforehand.

    Args:
        cuts_early: whether prompts are cut before they were read.
    Raises:
        ConfigError: as `check_predicts`, or prompts are.
    """
    if not isinstance(budget, str) or (allowed := find_auto_budget(budget)) is None:
        return None
    check_predicts(method, budget)
    curve = method.loss_curve()
    assert curve is not None
    if cuts_early:
        check_known_early(budget)
    return Automatic(allowed, 1.0 if allowed.at_most is None else parse_budget(allowed.at_most), curve)


def check_known_early(budget: Budget) -> None:
    """Refuse what each prompt decides, where it is cut before it was read.

    Raises:
        ConfigError: it does.
    """
    if is_auto(budget):
        problem = "is chosen once the whole prompt was read: leave out chunk_budget=N"
        raise ConfigError(problem, option="budget", value=as_typed(budget))


def observed_attention(inputs: LayerInputs) -> Tensor:
    """(B, H_kv, T) float32: what the window's queries attend to, their mean; 0 for the window's own tokens."""
    return mean_over_groups(inputs.attention_moments[0], inputs.num_kv_heads)


def uncovered(
    method: Method,
    observed: Sequence[Observation],
    scores: Sequence[Tensor],
    attention: Sequence[Tensor],
    counts: list[int],
    row_lengths: list[int],
) -> list[float]:
    """The share of attention that goes to tokens which are not kept, for each row: a mean over layers and heads.

    Args:
        observed, scores, attention: of each layer, as the method and `observed_attention` give them.
        counts: for each row, the tokens that a layer keeps on average.
    """
    budgets = method.share_heads(observed, [counts] * len(observed), row_lengths)
    total = torch.zeros(len(counts), dtype=torch.float32, device=attention[0].device)
    for own, layer_scores, layer_budgets in zip(attention, scores, budgets, strict=True):
        tokens = method.select(layer_scores, layer_budgets, row_lengths).expand(-1, own.shape[1], -1)
        kept = own.gather(-1, tokens.clamp(min=0)).masked_fill_(tokens == EMPTY_SLOT, 0)
        total += (own.sum(dim=-1) - kept.sum(dim=-1)).clamp_(min=0).mean(dim=-1)
    return [float(share) for share in (total / len(attention)).tolist()]


def choose_budgets(
    shares_at: Callable[[list[int]], list[float]],
    curve: LossCurve,
    max_loss: float,
    least: int,
    most: Sequence[int],
    row_lengths: Sequence[int],
) -> list[AutoChoice]:
    """For each row the fewest tokens whose predicted loss is at most `max_loss`, or `most` where more is lost.

    Args:
        shares_at: `uncovered` at one count a row.
        least, most: the fewest and, for each row, the most that may be kept.
    """
    ladders = [rungs(min(least, top), top) for top in most]
    low, high = [0] * len(ladders), [len(ladder) - 1 for ladder in ladders]
    shares: list[dict[int, float]] = [
        {top: 0.0} if top >= length else {} for top, length in zip(most, row_lengths, strict=True)
    ]
    while low != high or any(top not in known for known, top in zip(shares, _counts(ladders, high), strict=True)):
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        counts = _counts(ladders, middle)
        for row, share in enumerate(shares_at(counts)):
            if curve.loss(shares[row].setdefault(counts[row], share)) <= max_loss:
                high[row] = middle[row]
            elif low[row] < high[row]:
                low[row] = middle[row] + 1
    choices = []
    for count, known, ladder, length in zip(_counts(ladders, high), shares, ladders, row_lengths, strict=True):
        loss = curve.loss(known[count])
        why = _why(count, least=ladder[0], length=length, within=loss <= max_loss)
        choices.append(AutoChoice(count, known[count], loss, max_loss, why))
    return choices


def _counts(ladders: list[list[int]], places: list[int]) -> list[int]:
    return [ladder[place] for ladder, place in zip(ladders, places, strict=True)]


def _why(count: int, *, least: int, length: int, within: bool) -> str:
    if count >= length:
        return "all"
    if not within:
        return "at_most"
    return "least" if count == least else "loss"
