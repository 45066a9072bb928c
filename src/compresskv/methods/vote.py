"""The vote: the model's best semantic retrieval heads, wherever they sit, choose once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.cake import mean_plus_variance
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.profiles.profile import Profile, needed_profile
from compresskv.selection.scores import (
    mean_over_groups,
    pool,
    set_first,
    summing_to_one,
    without_padding,
)
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Vote(Method):
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
    needs_profile = True
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
    profile: Profile | None = None

    def with_profile(self, profile: Profile) -> Vote:
        """The method with a model's head scores.

        Raises:
            ProfileError: the profile holds ranks within layers.
        """
        return replace(self, profile=needed_profile(self.name, profile, across_layers=True))

    def window_at(self, budget: int) -> int:
        """See `window_for_budget`."""
        return window_for_budget(self.window_size, budget) if self.narrow else self.window_size

    def reads_layer(self, layer_idx: int) -> bool:
        """All layers where local attention counts, else those of the retrieval heads."""
        best = needed_profile(self.name, self.profile).best_heads[: self.num_heads]
        return self.local_weight > 0 or any(layer == layer_idx for layer, _ in best)

    def observe(self, inputs: LayerInputs) -> Observation:
        """The votes of the layer's retrieval heads and, if it counts, what all its heads attend to."""
        profile, local = needed_profile(self.name, self.profile), self.local_weight > 0
        vote = layer_vote(inputs, profile, self.num_heads, self.kernel_size, all_heads=local)
        wanted = self._wanted(inputs) if local else None
        return Observation(inputs.layer_idx, inputs.valid, scores=wanted, vote=vote)

    def _wanted(self, inputs: LayerInputs) -> Tensor:
        """(B, 1, T)."""
        local = mean_over_groups(mean_plus_variance(inputs), inputs.num_kv_heads)
        local = set_first(without_padding(local, inputs.valid), self.num_sinks, 0, inputs.valid)
        return summing_to_one(local).sqrt_().mean(dim=1, keepdim=True)

    def candidate_scores(self, layers: Sequence[Observation]) -> Tensor | None:
        """(B, 1, T): the vote and what all heads attend to, as far as these layers tell."""
        profile, local = (
            needed_profile(self.name, self.profile),
            [one.scores for one in layers if one.scores is not None],
        )
        if not local:  # no attention but that of the retrieval heads counts
            return None
        scores = foreseen_votes(layers, local, profile, self.num_heads, self.kernel_size)
        scores = scores + self.local_weight * summing_to_one(torch.stack(local).sum(dim=0))
        return set_first(scores, self.num_sinks, torch.inf, layers[0].valid)

    def score_layers(self, layers: Sequence[Observation]) -> list[Tensor]:
        """The same (B, 1, T) for every layer."""
        scores = count_votes(layers)
        if self.local_weight:
            wanted = torch.stack(super().score_layers(layers)).sum(dim=0)
            scores = scores + self.local_weight * summing_to_one(wanted)
        return [set_first(scores, self.num_sinks, torch.inf, layers[0].valid)] * len(layers)


def window_for_budget(window_size: int, budget: int) -> int:
    """The observation window at small budgets: at most half of the budget, and a quarter of it and 8 tokens.

    The window's own tokens are kept, so a wide one leaves nothing to choose: at 48 tokens, 20 of them observe.
    """
    return max(1, min(window_size, budget // 2, 8 + budget // 4))


def layer_vote(
    inputs: LayerInputs, profile: Profile, num_heads: int, kernel_size: int, *, all_heads: bool
) -> Tensor | None:
    """(B, 1, T): the votes of a layer's heads that are among the model's `num_heads` best; None where none of them is.

    Each head's window attention is pooled and normalised to sum 1, and counts by the head's retrieval score.

    Args:
        all_heads: whether the attention of all the layer's heads is needed anyway.
    """
    first, num_here = inputs.first_head, inputs.query_window.shape[1]
    best = profile.best_heads[:num_heads]
    heads = [head - first for layer, head in best if layer == inputs.layer_idx and first <= head < first + num_here]
    if not heads:
        return None
    attention = inputs.attention_moments[0][:, heads] if all_heads else inputs.attention_sums(heads)
    pooled = pool(attention, kernel_size)
    own = summing_to_one(without_padding(pooled, inputs.valid))  # (B, n, T)
    scores = profile.comparable_scores_of(inputs.layer_idx)
    weights = own.new_tensor([scores[first + head] for head in heads])
    return (own * weights[:, None]).sum(dim=1, keepdim=True)


def count_votes(layers: Sequence[Observation]) -> Tensor:
    """(B, 1, T): the vote of all layers; sums to 1."""
    return summing_to_one(torch.stack([layer.vote for layer in layers if layer.vote is not None]).sum(dim=0))


def foreseen_votes(
    layers: Sequence[Observation], local: Sequence[Tensor], profile: Profile, num_heads: int, kernel_size: int
) -> Tensor:
    """(B, 1, T): the vote of all layers as these first ones tell it; sums to 1.

    What all their heads attend to stands for the heads that are still to vote, by the weight of these.

    Args:
        local: for each of these layers, (B, H, T) of what its heads attend to.
        num_heads, kernel_size: of the vote.
    """
    seen = {layer.layer_idx for layer in layers}
    weights = [(layer, profile.comparable_scores_of(layer)[head]) for layer, head in profile.best_heads[:num_heads]]
    to_come = sum(weight for layer, weight in weights if layer not in seen)
    likely = torch.stack([own.mean(dim=1, keepdim=True) for own in local]).sum(dim=0)
    likely = summing_to_one(without_padding(pool(likely, kernel_size), layers[0].valid))
    votes = [layer.vote for layer in layers if layer.vote is not None]
    return summing_to_one(torch.stack([to_come * likely, *votes]).sum(dim=0))
