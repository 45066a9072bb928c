"""Methods that rank the tokens of all layers and KV heads in one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.ranges import Range, ranges
from compresskv.selection.scores import set_first
from compresskv.selection.select import head_counts_of_all, select_across_heads, select_rows
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankedTogether(Method):
    """Base of methods that rank the tokens of all layers and KV heads in one list, whatever question will come.

    The `num_sinks` first tokens are always kept. `guaranteed` is the share of an even budget that each KV head is sure
    of: 0 ranks all in one list, 1 gives equal numbers to all heads.
    """

    decides_together = True
    limits = ranges(num_sinks=Range(0), guaranteed=Range(0, 1))

    num_sinks: int = 4
    guaranteed: float = 0.0

    def observe(self, inputs: LayerInputs) -> Observation:
        """The layer's scores."""
        scores = set_first(self.score(inputs), self.num_sinks, torch.inf, inputs.valid)
        return Observation(inputs.layer_idx, inputs.valid, scores=scores)

    def share_heads(
        self, layers: Sequence[Observation], budgets: list[list[int]], row_lengths: list[int]
    ) -> list[list[list[int]]]:
        """As many for each KV head as it has among the best of all."""
        rows = []
        for row, length in enumerate(row_lengths):
            own = [scores[row, :, scores.shape[2] - length :] for scores in self.score_layers(layers)]
            rows.append(head_counts_of_all(own, budgets[0][row], self.window_size, self.guaranteed))
        return [list(column) for column in zip(*rows, strict=True)]

    def select(self, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]) -> Tensor:
        """(B, H_kv, R): a layer's heads share what the caller gave the layer."""
        if len(budgets[0]) == 1:
            return select_across_heads(scores, budgets, self.window_size, row_lengths, self.guaranteed)
        return select_rows(scores, budgets, self.window_size, row_lengths)
