"""Methods in which the model's best retrieval heads vote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.profiled import ProfiledMethod
from compresskv.profiles.profile import RANKS_ALONE
from compresskv.selection.scores import pool, summing_to_one, without_padding
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compresskv.profiles.profile import Profile


class VotingMethod(ProfiledMethod):
    """Base of methods in which the `num_heads` best heads of the whole model vote. A subclass has these options."""

    num_heads: int
    narrow: bool

    def lacks(self, profile: Profile) -> str | None:
        """Scores by which heads of different layers compare."""
        if profile.comparable_scores is not None:
            return None
        compares = f"method {self.name!r} compares heads of different layers"
        return f"{compares}, but the profile of {profile.model_id} {RANKS_ALONE}"

    def window_at(self, budget: int) -> int:
        """See `window_for_budget`."""
        return window_for_budget(self.window_size, budget) if self.narrow else self.window_size

    def layer_vote(self, inputs: LayerInputs, kernel_size: int, *, all_heads: bool) -> Tensor | None:
        """(B, 1, T): the votes of a layer's heads that are among the model's best; None where none of them is.

        Each head's window attention is pooled and normalised to sum 1, and counts by the head's retrieval score. Where
        earlier cuts left each KV head tokens of its own, the votes are for places in the text.

        Args:
            all_heads: whether the attention of all the layer's heads is needed anyway.
        """
        first, num_here = inputs.first_head, inputs.query_window.shape[1]
        best = self.measured.best_heads[: self.num_heads]
        heads = [head - first for layer, head in best if layer == inputs.layer_idx and first <= head < first + num_here]
        if not heads:
            return None
        attention = inputs.attention_moments[0][:, heads] if all_heads else inputs.attention_sums(heads)
        pooled = pool(attention, kernel_size)
        own = summing_to_one(without_padding(pooled, inputs.valid))  # (B, n, T)
        if inputs.positions is not None and not self.shares_positions:
            num_read = int(inputs.positions[0, 0, -1]) + 1
            readers = [head * inputs.num_kv_heads // num_here for head in heads]
            places = inputs.positions.expand(-1, inputs.num_kv_heads, -1)[:, readers]
            own = own.new_zeros(*own.shape[:2], num_read).scatter_(2, places, own)
        scores = self.measured.comparable_scores_of(inputs.layer_idx)
        weights = own.new_tensor([scores[first + head] for head in heads])
        return (own * weights[:, None]).sum(dim=1, keepdim=True)

    def foreseen_votes(self, layers: Sequence[Observation], local: Sequence[Tensor], kernel_size: int) -> Tensor:
        """(B, 1, T): the vote of all layers as these first ones tell it; sums to 1.

        What all their heads attend to stands for the heads that are still to vote, by the weight of these.

        Args:
            local: for each of these layers, (B, H, T) of what its heads attend to.
        """
        profile, seen = self.measured, {layer.layer_idx for layer in layers}
        best = profile.best_heads[: self.num_heads]
        to_come = sum(profile.comparable_scores_of(layer)[head] for layer, head in best if layer not in seen)
        likely = torch.stack([own.mean(dim=1, keepdim=True) for own in local]).sum(dim=0)
        likely = summing_to_one(without_padding(pool(likely, kernel_size), layers[0].valid))
        votes = [layer.vote for layer in layers if layer.vote is not None]
        return summing_to_one(torch.stack([to_come * likely, *votes]).sum(dim=0))


def window_for_budget(window_size: int, budget: int) -> int:
    """The observation window at small budgets: at most half of the budget, and a quarter of it and 8 tokens.

    The window's own tokens are kept, so a wide one leaves nothing to choose: at 48 tokens, 20 of them observe.
    """
    return max(1, min(window_size, budget // 2, 8 + budget // 4))


def count_votes(layers: Sequence[Observation]) -> Tensor:
    """(B, 1, T): the vote of all layers; sums to 1."""
    return summing_to_one(torch.stack([layer.vote for layer in layers if layer.vote is not None]).sum(dim=0))
