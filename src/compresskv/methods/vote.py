"""The vote: the model's best semantic retrieval heads, wherever they sit, choose once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.cake import mean_plus_variance
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.voting import VotingMethod, count_votes
from compresskv.selection.scores import (
    mean_over_groups,
    set_first,
    summing_to_one,
    without_padding,
)
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Vote(VotingMethod):
    """One vote of the `num_heads` best heads of the whole model, weighted by their scores: one list for all layers.

    Each head's window attention is pooled and normalised to sum 1, so that a head counts by its weight alone. To their
    vote, `local_weight` adds what all heads attend to, so that tokens which no retrieval head reads (lists, code, what
    a summary needs) are not starved: the square roots of CAKE's scores, so that a token counts by how many heads want
    it more than by how much one does; each head's normalised to sum 1, their mean over layers and heads too. The
    `num_sinks` first tokens are always kept. Small budgets narrow the window (`window_for_budget`).
    """

    name = "vote"
    summary = "the model's best retrieval heads choose one list for all layers"
    source = "this project"
    ours = True
    decides_together = True
    shares_positions = True
    limits = ranges(window_size=Range(1), num_heads=Range(1), num_sinks=Range(0), local_weight=Range(0))

    window_size: int = 32
    kernel_size: int = 25
    num_heads: int = 8
    num_sinks: int = 4
    local_weight: float = 0.5
    narrow: bool = True

    def reads_layer(self, layer_idx: int) -> bool:
        """All layers where local attention counts, else those of the retrieval heads."""
        best = self.measured.best_heads[: self.num_heads]
        return self.local_weight > 0 or any(layer == layer_idx for layer, _ in best)

    def observe(self, inputs: LayerInputs) -> Observation:
        """The votes of the layer's retrieval heads and, if it counts, what all its heads attend to."""
        local = self.local_weight > 0
        vote = self.layer_vote(inputs, self.kernel_size, all_heads=local)
        wanted = self._wanted(inputs) if local else None
        return Observation(inputs.layer_idx, inputs.valid, scores=wanted, vote=vote)

    def _wanted(self, inputs: LayerInputs) -> Tensor:
        """(B, 1, T)."""
        local = mean_over_groups(mean_plus_variance(inputs), inputs.num_kv_heads)
        local = set_first(without_padding(local, inputs.valid), self.num_sinks, 0, inputs.valid)
        return summing_to_one(local).sqrt_().mean(dim=1, keepdim=True)

    def candidate_scores(self, layers: Sequence[Observation]) -> Tensor | None:
        """(B, 1, T): the vote and what all heads attend to, as far as these layers tell."""
        local = [one.scores for one in layers if one.scores is not None]
        if not local:  # no attention but that of the retrieval heads counts
            return None
        scores = self.foreseen_votes(layers, local, self.kernel_size)
        scores = scores + self.local_weight * summing_to_one(torch.stack(local).sum(dim=0))
        return set_first(scores, self.num_sinks, torch.inf, layers[0].valid)

    def score_layers(self, layers: Sequence[Observation]) -> list[Tensor]:
        """The same (B, 1, T) for every layer."""
        scores = count_votes(layers)
        if self.local_weight:
            wanted = torch.stack(super().score_layers(layers)).sum(dim=0)
            scores = scores + self.local_weight * summing_to_one(wanted)
        return [set_first(scores, self.num_sinks, torch.inf, layers[0].valid)] * len(layers)
