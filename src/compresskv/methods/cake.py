"""CAKE: attention that is strong or restless over the window, and layer budgets from the prompt itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.snapkv import SnapKV
from compresskv.selection import sharing
from compresskv.selection.scores import mean_over_groups, pool
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

GAMMA = 200.0


@register
@dataclass(frozen=True)
class CAKE(SnapKV):
    """Mean attention plus `gamma` times its variance over the window; layers share by entropy and variance.

    A layer's preference is H^(1/tau1) * V^(1/tau2): H is the entropy of its attention over tokens, V the variance
    over the window's queries, each summed over the tokens before the window and averaged over heads.

    Source: CAKE (arXiv 2503.12491), sections 4.2 and 4.3; window and gamma are the paper's, tau1 and tau2, which it
    chooses for each model, are 1. Differs:
    layers are cut together at the end of prefill (the paper cuts them in a cascade, to the same result), and budgets
    sum exactly.
    """

    name = "cake"
    summary = "attention and its variance; layers share by the prompt"
    source = "arXiv 2503.12491"
    decides_together = True
    limits = ranges(gamma=Range(0), tau1=Range(0, above=True), tau2=Range(0, above=True))

    window_size: int = 32
    gamma: float = GAMMA
    tau1: float = 1.0
    tau2: float = 1.0

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        return pool(mean_over_groups(mean_plus_variance(inputs, self.gamma), inputs.keys.shape[1]), self.kernel_size)

    def observe(self, inputs: LayerInputs) -> Observation:
        """Scores and preference."""
        return replace(super().observe(inputs), preference=self._preference(inputs))

    def share_budgets(
        self, layers: Sequence[Observation], budgets: list[list[int]], row_lengths: list[int]
    ) -> list[list[int]]:
        """In proportion to the layers' shares, above what every layer is sure of."""
        rows = []
        for row, (length, shares) in enumerate(zip(row_lengths, self._shares(layers), strict=True)):
            mean = budgets[0][row]
            floor = min(self._num_sure, mean)
            spares = sharing.proportional((mean - floor) * len(layers), shares, length - floor)
            rows.append([floor + spare for spare in spares])
        return [list(column) for column in zip(*rows, strict=True)]

    def _shares(self, layers: Sequence[Observation]) -> list[list[float]]:
        """For each row of the batch, (L,): how the layers share, on any scale."""
        preferences = [layer.preference for layer in layers if layer.preference is not None]
        shares: list[list[float]] = torch.stack(preferences, dim=1).tolist()
        return shares

    @property
    def _num_sure(self) -> int:
        """Tokens that every layer keeps, as far as the budget goes."""
        return self.window_size

    def _preference(self, inputs: LayerInputs) -> Tensor:
        """(B,): how much of the budget the layer should have."""
        mean, variance = inputs.attention_moments
        entropy = -(mean * mean.clamp(min=torch.finfo(torch.float32).tiny).log()).sum(dim=-1).mean(dim=-1)
        restless = variance.sum(dim=-1).mean(dim=-1)
        return entropy.clamp(min=0) ** (1 / self.tau1) * restless ** (1 / self.tau2)


def mean_plus_variance(inputs: LayerInputs, gamma: float = GAMMA) -> Tensor:
    """(B, H_q, T): mean attention from the window plus `gamma` times its variance over the window's queries."""
    mean, variance = inputs.attention_moments
    return mean + gamma * variance
