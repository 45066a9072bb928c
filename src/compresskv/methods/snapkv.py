"""SnapKV: each KV head keeps the tokens that its own query heads attend to from the end of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection.scores import mean_over_groups, pool, sum_over_window

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class SnapKV(Method):
    """Window attention summed over the window, pooled, and averaged over the query heads of each KV head.

    Source: SnapKV (arXiv 2404.14469), section 4, with the window and kernel of CompressKV's comparison. Grouping is by
    the KV head that a query head reads, which CompressKV's published baseline gets wrong.
    """

    name = "snapkv"
    summary = "window attention, a choice per KV head"
    source = "arXiv 2404.14469"
    limits = ranges(window_size=Range(1, why="its queries choose"))

    window_size: int = 8
    kernel_size: int = 5

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        # pooling last, of fewer heads: both are sums, whose order does not matter
        return pool(mean_over_groups(sum_over_window(inputs.window_attention), inputs.keys.shape[1]), self.kernel_size)
