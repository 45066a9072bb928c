"""PyramidKV: SnapKV's choice, with budgets that shrink from the first layer to the last."""

from dataclasses import dataclass

from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.snapkv import SnapKV
from compresskv.selection import sharing


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with linear layer budgets.

    Source: PyramidKV (arXiv 2406.02069), section 4, beta = 20.
    """

    name = "pyramidkv"
    summary = "SnapKV with more budget in early layers"
    source = "arXiv 2406.02069"
    limits = ranges(beta=Range(1))

    beta: float = 20.0

    def layer_budgets(self, budget: int, num_layers: int, num_tokens: int) -> list[int]:
        """Linear from deep to shallow; see `compresskv.selection.sharing.pyramid`."""
        return sharing.pyramid(budget, num_layers, num_tokens, window_size=self.window_size, beta=self.beta)
