"""DefensiveKV: a token is worth the most that any query of the window attends to it, and heads of all layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.inputs import LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.together import RankedTogether
from compresskv.selection.scores import largest_of_group, pool, without_padding
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class DefensiveKV(RankedTogether):
    """The largest attention over the window's queries and a KV head's query heads, no less than the head's mean of it.

    Each query's attention is pooled first, and keeps its sum. What comes of it is multiplied by the norm of the token's
    value, and the tokens of all layers and KV heads are ranked in one list. The first `num_sinks` tokens and the window
    are always kept.

    Source: DefensiveKV (arXiv 2510.13334), its variant that shares over layers. Differs: norms are the values' own, not
    those of their projections to the layer's output, and there is no first stage that keeps 90 % of the attention.
    """

    name = "defensivekv"
    summary = "the most that any of the last queries attends to; all KV heads share"
    source = "arXiv 2510.13334"
    limits = ranges(window_size=Range(1, why="its queries choose"))

    window_size: int = 32
    kernel_size: int = 5

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        attention = inputs.window_attention
        window_size = attention.shape[2]
        num_older = attention.shape[3] - window_size
        older, valid = attention[..., :num_older], None if inputs.valid is None else inputs.valid[:, :num_older]
        pooled = pool(older.flatten(1, 2), self.kernel_size if num_older else 1)
        pooled = without_padding(pooled, valid).view(older.shape)
        pooled *= older.sum(dim=-1, keepdim=True) / pooled.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        scores = largest_of_group(pooled.amax(dim=2), inputs.keys.shape[1], valid)
        scores *= torch.linalg.vector_norm(inputs.values[:, :, :num_older], dim=-1, dtype=torch.float32)
        return torch.nn.functional.pad(without_padding(scores, valid), (0, window_size))
