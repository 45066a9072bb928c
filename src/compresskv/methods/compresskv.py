"""CompressKV: the layer's semantic retrieval heads choose for all its heads, and layers share by eviction error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.errors import ProfileError
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.profiled import ProfiledMethod
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection import sharing
from compresskv.selection.scores import pool

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class CompressKV(ProfiledMethod):
    """Window attention of the `heads_per_layer` best semantic retrieval heads, one choice for all KV heads.

    Source: CompressKV (arXiv 2508.02401), sections 3.2 and 3.3, Algorithm 1.
    """

    name = "compresskv"
    summary = "semantic retrieval heads choose; layers share by error"
    source = "arXiv 2508.02401"
    ours = True
    shares_heads = True
    limits = ranges(window_size=Range(1, why="its queries choose"), heads_per_layer=Range(1))

    window_size: int = 8
    kernel_size: int = 5
    heads_per_layer: int = 4

    def layer_budgets(self, budget: int, num_layers: int, num_tokens: int) -> list[int]:
        """In proportion to the profile's layer errors; see `compresskv.selection.sharing.error_aware`."""
        errors = self.measured.layer_errors
        if len(errors) != num_layers:
            raise ProfileError(
                f"the profile of {self.measured.model_id} has {len(errors)} layers, but {num_layers} are compressed"
            )
        return sharing.error_aware(budget, num_tokens, errors)

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, 1, T)."""
        sums = inputs.attention_sums(self.measured.top_heads(inputs.layer_idx, self.heads_per_layer))
        return pool(sums.mean(dim=1, keepdim=True), self.kernel_size)
