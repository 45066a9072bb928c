"""What a replay would attend to, forecast from keys and values: features, and a ridge regression in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 3e-3
"""The penalty on weights, as a share of each feature's variance."""
LEAST = 1e-3
"""Attention below this counts as this: how much less than nothing a token gets need not be learnt."""

NUM_MORE = 9
"""Features beside the key and the value."""


def replay_features(keys: Tensor, values: Tensor) -> Tensor:
    """What tells a token's worth in one KV head.

    Args:
        keys: (H_kv, T, D), before they are turned to their positions.
        values: (H_kv, T, D_v).
    Returns: (H_kv, T, D + D_v + `NUM_MORE`) float32: key, value; the norms of both, and their logarithms; the cosine of
        the key with the mean direction of all keys; the logarithms of how many tokens there are up to this one and from
        it on, the share that lies before it; and 1.
    """
    keys, values = keys.float(), values.float()
    num_kv_heads, num_tokens, _ = keys.shape
    norms = [torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp(min=1e-6) for states in (keys, values)]
    units = keys / norms[0]
    likeness = torch.nn.functional.cosine_similarity(units, units.sum(dim=1, keepdim=True), dim=-1)[..., None]
    before = torch.arange(num_tokens, dtype=torch.float32, device=keys.device)
    place = torch.stack([(before + 1).log(), (num_tokens - before).log(), before / num_tokens, before * 0 + 1], dim=-1)
    logarithms = [norm.log() for norm in norms]
    return torch.cat([keys, values, *norms, *logarithms, likeness, place.expand(num_kv_heads, -1, -1)], dim=-1)


class Regression:
    """Sums over tokens, from which the weights of each KV head of one layer are solved."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, features: Tensor, replayed: Tensor) -> None:
        """Count tokens: features (H_kv, n, F) and the largest attention that a replay paid them, (H_kv, n)."""
        features, wanted = features.cpu().double(), replayed.cpu().double().clamp(min=LEAST).log()
        gram, products = features.transpose(1, 2) @ features, (features.transpose(1, 2) @ wanted[..., None])[..., 0]
        self._gram = gram if self._gram is None else self._gram + gram
        self._products = products if self._products is None else self._products + products

    def solve(self) -> Tensor:
        """(H_kv, F) float32: weights whose product with features forecasts the logarithm of that attention.

        The last feature, which is 1, is not penalised; all others as if each had a variance of 1.
        """
        assert self._gram is not None
        assert self._products is not None
        count = self._gram[:, -1:, -1:]
        gram, products = self._gram / count, self._products / count[..., 0]
        means, wanted = gram[:, :-1, -1], products[:, -1:]
        covariance = gram[:, :-1, :-1] - means[:, :, None] * means[:, None]
        spread = covariance.diagonal(dim1=1, dim2=2).clamp(min=1e-12).sqrt()
        scaled = covariance / (spread[:, :, None] * spread[:, None])
        scaled.diagonal(dim1=1, dim2=2).add_(RIDGE)
        weights = torch.linalg.solve(scaled, (products[:, :-1] - means * wanted) / spread) / spread
        constant = wanted - (weights * means).sum(dim=-1, keepdim=True)
        return torch.cat([weights, constant], dim=-1).float()
