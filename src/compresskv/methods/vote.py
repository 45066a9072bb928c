"""The vote: the model's best semantic retrieval heads, wherever they sit, choose once for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresskv.errors import ConfigError
from compresskv.method import LayerInputs, Method
from compresskv.profiles.profile import Profile, needed_profile
from compresskv.registry import register
from compresskv.scoring import heads_window_attention, pool, set_first, sum_over_window, without_padding


@register
@dataclass(frozen=True)
class Vote(Method):
    """One vote of the `num_heads` best heads of the whole model, weighted by their scores.

    Each head's window attention is pooled and normalised to sum 1, so that a head counts by its weight alone. The
    `num_sinks` first tokens are always kept.
    """

    name = "vote"
    summary = "the model's best retrieval heads choose for all layers"
    source = "this project"
    needs_profile = True
    decides_together = True

    window_size: int = 32
    kernel_size: int = 25
    num_heads: int = 8
    num_sinks: int = 4
    profile: Profile | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        for option, least in (("window_size", 1), ("num_heads", 1), ("num_sinks", 0)):
            if getattr(self, option) < least:
                raise ConfigError(f"{option}={getattr(self, option)} must be at least {least}")

    def with_profile(self, profile: Profile) -> "Vote":
        """The method with a model's head scores.

        Raises:
            ProfileError: the profile holds ranks within layers.
        """
        return replace(self, profile=needed_profile(self.name, profile, across_layers=True))

    def score_layers(self, layers: Sequence[LayerInputs]) -> list[Tensor]:
        """The same (B, 1, T) for every layer."""
        vote = cast_vote(layers, needed_profile(self.name, self.profile), self.num_heads, self.kernel_size)
        return [set_first(vote, self.num_sinks, torch.inf, layers[0].valid)] * len(layers)


def cast_vote(layers: Sequence[LayerInputs], profile: Profile, num_heads: int, kernel_size: int) -> Tensor:
    """(B, 1, T): the vote of the `num_heads` best semantic retrieval heads of the whole model; sums to 1.

    Each head's window attention is pooled and normalised, and counts by the head's score.
    """
    best = profile.ranked_heads(profile.semantic_scores)[:num_heads]
    votes: list[Tensor] = []
    for inputs in layers:
        heads = [head for layer_idx, head in best if layer_idx == inputs.layer_idx]
        if heads:
            attention = heads_window_attention(
                inputs.query_window,
                inputs.keys,
                heads,
                scaling=inputs.scaling,
                softcap=inputs.softcap,
                valid=inputs.valid,
            )
            pooled = pool(sum_over_window(attention), kernel_size)
            own = normalised(without_padding(pooled, inputs.valid))  # (B, n, T)
            scores = profile.semantic_scores[profile.layer_indices.index(inputs.layer_idx)]
            weights = own.new_tensor([scores[head] for head in heads])
            votes.append((own * weights[:, None]).sum(dim=1, keepdim=True))
    return normalised(torch.stack(votes).sum(dim=0))


def normalised(scores: Tensor) -> Tensor:
    """(B, H, T) non-negative, each head's divided by their sum."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
