"""Scores and a budget become indices: which prompt tokens each KV head keeps."""

import torch
from torch import Tensor

UNUSED = -1
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
    older = scores[..., : num_tokens - num_recent]
    order = older.sort(dim=-1, descending=True, stable=True).indices
    best = order[..., : budget - num_recent].sort(dim=-1).values
    return torch.cat([best, recent], dim=-1)


def select_rows(scores: Tensor, budgets: list[int], window_size: int, row_lengths: list[int]) -> Tensor:
    """`select` for a left-padded batch: each row chooses among its own tokens, with its own budget.

    Args:
        scores: (B, H, T).
        budgets: B numbers of tokens to keep.
        row_lengths: B numbers of tokens that are not padding.
    Returns: (B, H, R) int64 with R the largest number kept in a row; ascending; shorter rows begin with `UNUSED`.
    """
    num_heads, num_tokens = scores.shape[1:]
    kept = [min(budget, length) for budget, length in zip(budgets, row_lengths, strict=True)]
    indices = scores.new_full((len(kept), num_heads, max(kept)), UNUSED, dtype=torch.long)
    for row, (num_kept, length) in enumerate(zip(kept, row_lengths, strict=True)):
        start = num_tokens - length
        chosen = select(scores[row : row + 1, :, start:], num_kept, window_size)
        indices[row, :, max(kept) - num_kept :] = chosen[0] + start
    return indices
