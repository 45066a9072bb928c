"""HeadKV: KV heads that retrieve, as measured offline, get more of the budget."""

import math
from dataclasses import dataclass

from compresskv.methods.profiled import ProfiledMethod
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.snapkv import SnapKV
from compresskv.selection import sharing


@register
@dataclass(frozen=True)
class HeadKV(SnapKV, ProfiledMethod):
    """SnapKV's choice with budgets per KV head: 1 / beta of the whole in proportion to head scores, the rest evenly.

    Source: HeadKV (arXiv 2410.19258), section 3.2. Differs: its head scores come from retrieval-and-reasoning tests;
    here they are the profile's traditional retrieval scores (semantic ones where a profile has no others), summed
    over the query heads that read a KV head.
    """

    name = "headkv"
    summary = "SnapKV; KV heads share by retrieval scores"
    source = "arXiv 2410.19258"
    limits = ranges(beta=Range(1))

    beta: float = 1.2

    def head_budgets(self, budget: int, num_layers: int, num_tokens: int) -> list[list[int]]:
        """(L, H_kv) tokens; the sum is exact."""
        scores = [score for layer in self._kv_head_scores() for score in layer]
        num_kv_heads, norm = len(scores) // num_layers, math.fsum(scores) or 1.0  # no retrieval head: evenly
        budget = min(budget, num_tokens)
        spare = max(0, budget - self.window_size)
        shares = [(1 - 1 / self.beta) / len(scores) + score / norm / self.beta for score in scores]
        extra = sharing.proportional(spare * len(scores), shares, num_tokens - budget + spare)
        counts = [budget - spare + more for more in extra]
        return [counts[start : start + num_kv_heads] for start in range(0, len(counts), num_kv_heads)]

    def _kv_head_scores(self) -> list[list[float]]:
        """(L, H_kv)."""
        own = self.measured.fingerprint
        groups = own.num_query_heads // own.num_kv_heads
        rows = self.measured.traditional_scores or self.measured.semantic_scores
        return [[sum(row[head : head + groups]) for head in range(0, len(row), groups)] for row in rows]
