"""Scores and a budget become indices: which prompt tokens each KV head keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

EMPTY_SLOT = -1
"""Index of a slot that holds no token: rows of a padded batch may retain fewer tokens than the longest row."""


def select(scores: Tensor, budget: int, window_size: int) -> Tensor:
    """The `budget` tokens to keep: the last `window_size`, then the best scores of the others.

    Equal scores go to the earlier token, so that the choice does not depend on the device or on padding.
    A budget at or below the window keeps the most recent `budget` tokens.

    Args:
        scores: (B, H, T), any float dtype; H is the number of KV heads, or 1 where all share one choice.
        budget: tokens to keep, window included.
        window_size: the most recent tokens that are always kept.
    Returns: (B, H, min(budget, T)) int64, ascending, unique.
    """
    batch_size, num_heads, num_tokens = scores.shape
    budget = min(budget, num_tokens)
    num_recent = budget if budget == num_tokens else min(window_size, budget)
    recent = torch.arange(num_tokens - num_recent, num_tokens, device=scores.device)
    recent = recent.expand(batch_size, num_heads, num_recent)
    if budget == num_recent:
        return recent.contiguous()
    best = _best(scores[..., : num_tokens - num_recent], budget - num_recent)
    return torch.cat([best, recent], dim=-1)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices (B, H, count) of the best scores, ascending; of equal ones the earlier: much faster than sorting."""
    if scores.device.type == "cpu":  # a GPU is not asked whether there are equal ones: that would wait for it
        best = scores.topk(min(count + 1, scores.shape[-1]), dim=-1)  # NaN comes first
        at_border = best.values[..., count - 1 :]
        if bool((at_border[..., 1:] < at_border[..., :1]).all() and not best.values[..., 0].isnan().any()):
            return best.indices[..., :count].sort(dim=-1).values
    scores = scores.masked_fill(scores.isnan(), -torch.inf)  # a NaN is neither better nor equal
    least = scores.topk(count, dim=-1).values[..., -1:]
    better, equal = scores > least, scores == least
    better |= equal & (equal.cumsum(-1) <= count - better.sum(dim=-1, keepdim=True))
    positions = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(better, positions, scores.shape[-1]).topk(count, dim=-1, largest=False).values


def select_rows(scores: Tensor, budgets: list[list[int]], window_size: int, row_lengths: list[int]) -> Tensor:
    """`select` for a left-padded batch and for budgets that differ between KV heads.

    Args:
        scores: (B, H, T).
        budgets: for each of B rows, the tokens to keep in each of H_kv heads, or one number for all of them; with one
            number in every row, H stays as it is, else scores of one head serve them all.
        row_lengths: B numbers of tokens that are not padding: each row chooses among its own.
    Returns: (B, H or H_kv, R) int64 with R the largest number kept anywhere; ascending; what keeps fewer begins with
        `EMPTY_SLOT`.
    """
    if row_lengths == [scores.shape[2]] and len(set(budgets[0])) == 1 and len(budgets[0]) in (1, scores.shape[1]):
        return select(scores, budgets[0][0], window_size)  # the usual case, with fewer copies
    num_heads, num_tokens = max(scores.shape[1], *(len(counts) for counts in budgets)), scores.shape[2]
    scores = scores.expand(-1, num_heads, -1)
    longest = max(min(max(counts), length) for counts, length in zip(budgets, row_lengths, strict=True))
    indices = scores.new_full((len(budgets), num_heads, longest), EMPTY_SLOT, dtype=torch.long)
    for row, (counts, length) in enumerate(zip(budgets, row_lengths, strict=True)):
        start = num_tokens - length
        together = len(set(counts)) == 1
        for head in range(1 if together else num_heads):
            heads = slice(None) if together else slice(head, head + 1)
            chosen = select(scores[row : row + 1, heads, start:], counts[head], window_size)[0] + start
            indices[row, heads, longest - chosen.shape[-1] :] = chosen
    return indices


def select_across_heads(
    scores: Tensor, budgets: list[list[int]], window_size: int, row_lengths: list[int], guaranteed: float
) -> Tensor:
    """A layer's best tokens of all KV heads together, so that heads keep different numbers.

    Args:
        scores: (B, H_kv, T).
        budgets: for each of B rows, one number: the mean over heads.
        guaranteed: share of an even budget that each head is sure of, 0 to 1.
    Returns: (B, H_kv, R); see `select_rows`.
    Source: AdaKV (arXiv 2407.11550), Algorithm 1, its safeguard as in NVIDIA kvpress; see `AdaKV`.
    """
    counts = [
        _head_counts(scores[row, :, scores.shape[2] - length :], own[0], window_size, guaranteed)
        for row, (own, length) in enumerate(zip(budgets, row_lengths, strict=True))
    ]
    return select_rows(scores, counts, window_size, row_lengths)


def _head_counts(scores: Tensor, budget: int, window_size: int, guaranteed: float, least: int = 0) -> list[int]:
    """Tokens for each head at a mean of `budget`, not fewer than `least`; scores (H_kv, T)."""
    num_heads, num_tokens = scores.shape
    num_older = num_tokens - window_size
    spare = min(budget, num_tokens) - window_size
    if spare <= 0 or spare >= num_older:
        return [min(budget, num_tokens)] * num_heads
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    num_infinite = int(torch.isinf(scores[:, :num_older]).sum(dim=-1).amax())  # sinks: each head keeps its own
    sure = max(int(guaranteed * spare), min(max(num_infinite, least), spare))
    num_contested = (spare - sure) * num_heads  # one head could win all of them
    best = scores[:, :num_older].topk(min(sure + num_contested, num_older), dim=-1).values
    won = _won(best[:, sure:], num_contested)
    counts: list[int] = (won + sure + window_size).tolist()
    return counts


def _won(scores: Tensor, count: int) -> Tensor:
    """How many of the `count` best among all heads' scores (H, n) are each head's; of equal ones, the lower head's."""
    if count == 0:
        return scores.new_zeros(len(scores), dtype=torch.long)
    least = scores.flatten().topk(count).values[-1]
    better, equal = (scores > least).sum(dim=-1), (scores == least).sum(dim=-1)
    left = count - better.sum() - (equal.cumsum(0) - equal)  # for each head, what lower ones left of the equal ones
    return better + left.clamp(min=0).minimum(equal)


def head_counts_of_all(scores: list[Tensor], budget: int, window_size: int, guaranteed: float = 0.0) -> list[list[int]]:
    """How many tokens each KV head keeps where those of all layers are ranked in one list.

    Args:
        scores: for each of L layers (H_kv, T); H_kv may differ.
        budget: tokens for each head, on average over all heads of all layers.
        guaranteed: share of an even budget that each head is sure of, 0 to 1; 0 is sure of one token.
    Returns: (L, H_kv); the sum is exactly min(budget, T) times the number of heads.
    """
    counts = iter(_head_counts(torch.cat(scores), budget, window_size, guaranteed, least=1))
    return [[next(counts) for _ in own] for own in scores]


def tokens_at(slots: Tensor, tokens: Tensor) -> Tensor:
    """(B, 1 or H, R): the tokens (B, 1 or H, n) that stand in some slots (B, 1 or H, R); `EMPTY_SLOT` stays itself."""
    num_heads = max(slots.shape[1], tokens.shape[1])
    slots = slots.expand(-1, num_heads, -1)
    found = tokens.expand(-1, num_heads, -1).gather(-1, slots.clamp(min=0))
    return found.masked_fill(slots == EMPTY_SLOT, EMPTY_SLOT)
