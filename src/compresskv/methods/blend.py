"""The blend: a vote of the model's retrieval heads where it will be read, and each head's own attention elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compresskv.methods.cake import CAKE, mean_plus_variance
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.voting import VotingMethod, count_votes
from compresskv.profiles.layer_errors import l1_normalised
from compresskv.selection.auto_budget import LossCurve
from compresskv.selection.scores import mean_over_groups, pool, set_first, without_padding
from compresskv.selection.select import select_across_heads
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Blend(CAKE, VotingMethod):
    """Local scores plus the retrieval heads' vote, which counts in a KV head as much as that head retrieves.

    Local scores are CAKE's (attention from the window, and its variance), without pooling, times the norm of the
    token's value, divided by their mean sum over the layer's KV heads. The vote (see `Vote`) sums to 1; in a KV head it
    is weighted by `vote_weight` times the best retrieval score among the query heads that read it, divided by the
    model's best: the semantic score, or in imported profiles the traditional one.

    The budgets of `settled_layers` layers are dealt to all layers by the profile's eviction errors, whatever the
    prompt, and the rest by CAKE's preferences: where few layers attend in full, no prompt can starve one of them. The
    KV heads of a layer share by AdaKV's rule. The `num_sinks` first tokens are always kept. Small budgets narrow the
    window (`window_for_budget`).

    Source: this project; the parts are those of CompressKV (arXiv 2508.02401), CAKE (2503.12491) and AdaKV
    (2407.11550). docs/choices.md tells what each contributes.
    """

    name = "blend"
    summary = "a vote of retrieval heads where it is read, local attention elsewhere"
    source = "this project"
    ours = True
    general_loss = LossCurve(scale=90.0, power=2.0)
    limits = ranges(
        vote_kernel_size=Range(1, odd=True),
        vote_weight=Range(0),
        num_heads=Range(1),
        num_sinks=Range(0),
        guaranteed=Range(0, 1),
        settled_layers=Range(0),
    )

    kernel_size: int = 1
    vote_kernel_size: int = 25
    vote_weight: float = 1.0
    num_heads: int = 16
    num_sinks: int = 4
    guaranteed: float = 0.2
    settled_layers: float = 3.0
    narrow: bool = True

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T): the local scores, before they are divided."""
        worth = mean_over_groups(mean_plus_variance(inputs, self.gamma), inputs.keys.shape[1])
        return pool(worth * torch.linalg.vector_norm(inputs.values, dim=-1, dtype=torch.float32), self.kernel_size)

    def observe(self, inputs: LayerInputs) -> Observation:
        """The layer's preference, its local scores, divided so that their mean sum is 1, and the votes of its heads."""
        observed = super().observe(inputs)
        assert observed.scores is not None
        local = set_first(without_padding(observed.scores, inputs.valid), self.num_sinks, 0, inputs.valid)
        scale = local.sum(dim=-1).mean(dim=-1)[:, None, None].clamp(min=torch.finfo(local.dtype).tiny)
        vote = self.layer_vote(inputs, self.vote_kernel_size, all_heads=True)
        return replace(observed, scores=local / scale, vote=vote, positions=inputs.positions)

    def candidate_scores(self, layers: Sequence[Observation]) -> Tensor:
        """(B, H_kv, T): with the vote as far as these layers tell it."""
        local = super().score_layers(layers)
        return self._blended(layers[-1], local[-1], self.foreseen_votes(layers, local, self.vote_kernel_size))

    def score_layers(self, layers: Sequence[Observation]) -> list[Tensor]:
        """(B, H_kv, T) for each layer."""
        vote = count_votes(layers)
        return [
            self._blended(observed, local, vote)
            for observed, local in zip(layers, super().score_layers(layers), strict=True)
        ]

    def _blended(self, observed: Observation, local: Tensor, vote: Tensor) -> Tensor:
        """(B, H_kv, T): a layer's scores and the vote, as much as each head retrieves."""
        if observed.positions is not None:
            heads = (-1, local.shape[1], -1)
            vote = vote.expand(heads).gather(2, observed.positions.to(vote.device).expand(heads))
        weights = local.new_tensor(self.measured.kv_head_weights(observed.layer_idx))[:, None]
        return set_first(local + self.vote_weight * weights * vote, self.num_sinks, torch.inf, observed.valid)

    def _shares(self, layers: Sequence[Observation]) -> list[list[float]]:
        errors = [self.measured.layer_error(layer.layer_idx) for layer in layers]
        settled = min(1.0, self.settled_layers / len(layers))
        rows = []
        for preferences in super()._shares(layers):
            wanted = zip(l1_normalised(preferences), l1_normalised(errors), strict=True)
            rows.append([(1 - settled) * preference + settled * error for preference, error in wanted])
        return rows

    @property
    def _num_sure(self) -> int:
        return self.window_size + self.num_sinks

    def select(self, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]) -> Tensor:
        """(B, H_kv, R)."""
        return select_across_heads(scores, budgets, self.window_size, row_lengths, self.guaranteed)
