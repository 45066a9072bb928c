"""AdaKV: SnapKV's scores, with a layer's budget dealt to whichever KV heads hold the best tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compresskv.errors import ConfigError
from compresskv.methods.snapkv import SnapKV
from compresskv.registry import register
from compresskv.selection import select_rows


@register
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """The best tokens of all KV heads of a layer together; each head is sure of a share of an even budget.

    Source: AdaKV (arXiv 2407.11550), Algorithm 1, alpha = 0.2. Differs: the sum over a layer's heads is exact (the
    published code rounds each head's budget down).
    """

    name = "adakv"
    summary = "SnapKV with budgets per KV head"
    source = "arXiv 2407.11550"

    guaranteed: float = 0.2

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        if not 0 <= self.guaranteed <= 1:
            raise ConfigError(f"guaranteed={self.guaranteed} must lie between 0 and 1")

    def select(self, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]) -> Tensor:
        """(B, H_kv, R)."""
        shared = [
            self._share(scores[row, :, scores.shape[2] - length :], counts[0])
            for row, (counts, length) in enumerate(zip(budgets, row_lengths, strict=True))
        ]
        return select_rows(scores, shared, self.window_size, row_lengths)

    def _share(self, scores: Tensor, budget: int) -> list[int]:
        """Tokens for each head at a mean of `budget`; scores (H_kv, T)."""
        num_heads, num_tokens = scores.shape
        num_older = num_tokens - self.window_size
        spare = min(budget, num_tokens) - self.window_size
        if spare <= 0 or spare >= num_older:
            return [min(budget, num_tokens)] * num_heads
        older = scores[:, :num_older].double()
        sure = int(self.guaranteed * spare)
        order = older.sort(dim=-1, descending=True, stable=True)
        contested = order.values[:, sure:].flatten()  # equal scores: the lower head first, as everywhere
        winners = contested.sort(descending=True, stable=True).indices[: (spare - sure) * num_heads]
        won = torch.bincount(winners // (num_older - sure), minlength=num_heads)
        counts: list[int] = (won + sure + self.window_size).tolist()
        return counts
