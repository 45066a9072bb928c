"""Rows of a batch that are cut alike, and what their layers tell before they are."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own short name
from torch import Tensor

from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.inputs import Observation
from compresskv.selection.select import EMPTY_SLOT, select_rows, tokens_at
from compresskv.selection.sharing import proportional
from compresskv.system.check import check_count

LEAST_CANDIDATES = 512
"""Tokens that it holds at least: little beside any prompt that is worth it."""
MUCH_LONGER = 2
"""Times its candidates that a prompt must have for the rest to be freed."""


def check_candidates(candidates: int | None) -> None:
    """Refuse what is neither None nor a number of at least 1.

    Raises:
        ConfigError: naming it.
    """
    check_count("candidates", candidates, or_none=True)


@dataclass
class Group:
    """Rows of a batch that one method serves with one window."""

    method: Method
    evenly: bool = False
    """Whether all KV heads keep as many tokens, however the method shares them out in the end."""
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row that are no padding."""
    budgets: list[list[list[int]]] = field(default_factory=list)
    """(rows, L, 1 or H_kv)."""
    observed: list[Observation] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    """`observed_attention` of each layer, where a prompt decides its budget."""
    candidates: dict[int, tuple[Tensor, list[int]]] = field(default_factory=dict)
    """For layers that hold some of the prompt alone until all are decided, by position: (rows, 1 or H_kv, C), and how
    many of each row."""

    @property
    def keeps_all(self) -> bool:
        """Whether no layer evicts anything."""
        return all(map(self.keeps_all_of, range(len(self.budgets[0]))))

    def keeps_all_of(self, position: int) -> bool:
        """Whether one layer evicts nothing."""
        counts = (min(budgets[position]) for budgets in self.budgets)
        return all(count >= length for count, length in zip(counts, self.lengths, strict=True))

    def has_spare(self, factor: int) -> bool:
        """Whether the layer that was observed last need not hold all of the prompt."""
        return self._num_candidates(factor) != self.lengths

    def _num_candidates(self, factor: int) -> list[int]:
        """How many tokens of each row the layer that was observed last goes on holding."""
        position, counts = len(self.observed) - 1, []
        for budgets, length in zip(self.budgets, self.lengths, strict=True):
            own = budgets[position]
            count = max(LEAST_CANDIDATES, factor * -(-sum(own) // len(own)))
            counts.append(count if length >= MUCH_LONGER * count else length)
        return counts

    def nominated(self, factor: int) -> Tensor | None:
        """(rows, 1 or H_kv, C): what that layer goes on holding; None where the method cannot tell."""
        scores = self.method.candidate_scores(self.observed)
        if scores is None:
            return None
        counts = self._num_candidates(factor)
        tokens = select_rows(scores, [[count] for count in counts], self.method.window_size, self.lengths)
        self.candidates[len(self.observed) - 1] = tokens, counts
        return tokens

    def decided(self, *, shared: bool) -> list[Tensor]:
        """Scores of all layers, once all were observed; budgets that the prompt tells are shared out first."""
        if shared and not self.evenly:
            means = [[budgets[position][0] for budgets in self.budgets] for position in range(len(self.observed))]
            by_layer = self.method.share_heads(self.observed, means, self.lengths)
            self.budgets = [
                self._within_candidates(row, list(own)) for row, own in enumerate(zip(*by_layer, strict=True))
            ]
        scores = self.method.score_layers(self.observed)
        self.observed = []
        return scores

    def _within_candidates(self, row: int, budgets: list[list[int]]) -> list[list[int]]:
        """A row's budgets (L, 1 or H_kv), where no layer keeps more than it holds; others have what is over."""
        if not self.candidates:
            return budgets
        whole = None, self.lengths
        held = [self.candidates.get(position, whole)[1][row] for position in range(len(budgets))]
        caps = [cap for cap, own in zip(held, budgets, strict=True) for _ in own]
        counts = [count for own in budgets for count in own]
        if all(count <= cap for count, cap in zip(counts, caps, strict=True)):
            return budgets
        dealt = iter(proportional(sum(counts), counts, caps))
        return [[next(dealt) for _ in own] for own in budgets]

    def selected(self, position: int, scores: Tensor) -> Tensor:
        """(rows, 1 or H_kv, R): the tokens that one layer keeps."""
        select = Method.select if self.evenly else type(self.method).select
        budgets = [budgets[position] for budgets in self.budgets]
        if position not in self.candidates:
            return select(self.method, scores, budgets, self.lengths)
        # as from a batch of prompts that have nothing but the candidates
        tokens, lengths = self.candidates.pop(position)
        candidates = tokens.to(scores.device)
        own = scores.expand(-1, candidates.shape[1], -1).gather(-1, candidates.clamp(min=0))
        return tokens_at(select(self.method, own, budgets, lengths), candidates)

    def checked(self, scores: Tensor, num_heads: int, num_tokens: int) -> Tensor:
        """What the method gave as scores of a layer: see `checked_scores`."""
        return checked_scores(scores, (len(self.rows), num_heads, num_tokens), self.method)

    def told(self, scores: Tensor) -> Tensor:
        """Those by which tokens were chosen; infinite for the window's own, which are kept whatever they are."""
        num_own = min(self.method.window_size, scores.shape[2])
        return F.pad(scores[..., : scores.shape[2] - num_own], (0, num_own), value=torch.inf)


def checked_scores(scores: Tensor, shape: tuple[int, int, int], method: Method, option: str = "method") -> Tensor:
    """What a method gave as (B, H_kv, T), or (B, 1, T), scores of that shape.

    Raises:
        ConfigError: they are none; naming what the method was given as.
    """
    batch_size, _, num_tokens = shape
    if isinstance(scores, Tensor) and scores.is_floating_point():
        if tuple(scores.shape) in (shape, (batch_size, 1, num_tokens)):
            return scores
        found = str(tuple(scores.shape))
    else:
        found = str(scores.dtype) if isinstance(scores, Tensor) else type(scores).__name__
    problem = f"must score {shape}, or one head for all, in floats: its scores are {found}"
    raise ConfigError(problem, option=option, value=method.label)


def one_batch(parts: list[Tensor], rows: list[list[int]]) -> Tensor:
    """Rows (n, 1 or H, R) of several groups in their places; those that are shorter begin with `EMPTY_SLOT`."""
    if len(parts) == 1:
        return parts[0]
    num_heads, longest = (max(part.shape[dim] for part in parts) for dim in (1, 2))
    batch = parts[0].new_full((sum(map(len, rows)), num_heads, longest), EMPTY_SLOT)
    for part, own in zip(parts, rows, strict=True):
        batch[own, :, longest - part.shape[2] :] = part.expand(-1, num_heads, -1)
    return batch
