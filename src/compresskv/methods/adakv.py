"""AdaKV: SnapKV's scores, with a layer's budget dealt to whichever KV heads hold the best tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.snapkv import SnapKV
from compresskv.selection.select import select_across_heads

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """The best tokens of all KV heads of a layer together; each head is sure of a share of an even budget.

    Source: AdaKV (arXiv 2407.11550), Algorithm 1, alpha = 0.2. Differs: the sum over a layer's heads is exact (the
    published code rounds each head's number). A head's guaranteed share are its own best tokens, and heads contest the
    rest, as in NVIDIA kvpress; the published code lets heads contest all, and mixes the numbers they win, times
    1 - alpha, with alpha of an even budget. That is more even where no head wins less.
    """

    name = "adakv"
    summary = "SnapKV with budgets per KV head"
    source = "arXiv 2407.11550"
    limits = ranges(guaranteed=Range(0, 1))

    guaranteed: float = 0.2

    def select(self, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]) -> Tensor:
        """(B, H_kv, R)."""
        return select_across_heads(scores, budgets, self.window_size, row_lengths, self.guaranteed)
