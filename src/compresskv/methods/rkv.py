"""R-KV: tokens that the last queries attend to, and whose keys say what no others say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection.redundancy import redundancy
from compresskv.selection.scores import pool, set_first, sum_over_window, summing_to_one, without_padding
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class RKV(Method):
    """Importance minus redundancy, for caches that are cut again and again while a long answer is generated.

    Importance is the window's attention, the largest among the query heads of a KV head, pooled. Redundancy is the mean
    cosine similarity of a token's key to those of the others, of which each forgives the latest that is more similar
    than `threshold`. Both sum to 1 over tokens.

    Source: R-KV (arXiv 2505.24133), section 3. Differs: the `num_sinks` first tokens are always kept; pooling
    averages; importance weighs 0.5 where the paper gives it 0.1, which lost more (docs/methods.md).
    """

    name = "rkv"
    summary = "attention of the last tokens minus redundancy of keys"
    source = "arXiv 2505.24133"
    limits = ranges(
        window_size=Range(1, why="its queries choose"),
        importance=Range(0, 1),
        threshold=Range(-1, 1),
        num_sinks=Range(0),
    )

    window_size: int = 8
    kernel_size: int = 7
    importance: float = 0.5
    threshold: float = 0.5
    num_sinks: int = 4

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        return set_first(self.wanted_now(inputs), self.num_sinks, torch.inf, inputs.valid)

    def wanted_now(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T): importance minus redundancy, of sinks as of all others."""
        by_head = sum_over_window(inputs.window_attention)
        largest = by_head.view(len(by_head), inputs.num_kv_heads, -1, by_head.shape[-1]).amax(dim=2)
        wanted = summing_to_one(without_padding(pool(largest, self.kernel_size), inputs.valid))
        alike = redundancy(inputs.keys, self.threshold, inputs.valid)
        return self.importance * wanted - (1 - self.importance) * alike


@register
@dataclass(frozen=True)
class SharedRKV(RKV):
    """The mean of R-KV's scores over all layers and KV heads: one list of tokens for all."""

    name = "rkv_shared"
    summary = "R-KV's scores, one list for all layers"
    source = "this project, after arXiv 2505.24133"
    decides_together = True
    shares_positions = True

    def observe(self, inputs: LayerInputs) -> Observation:
        """The mean over the layer's heads."""
        return Observation(inputs.layer_idx, inputs.valid, scores=self.score(inputs).mean(dim=1, keepdim=True))

    def score_layers(self, layers: Sequence[Observation]) -> list[Tensor]:
        """The same (B, 1, T) for every layer."""
        return [torch.stack(super().score_layers(layers)).mean(dim=0)] * len(layers)
