"""The vote: the model's best semantic retrieval heads, wherever they sit, choose once for all layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresskv.errors import ConfigError, ProfileError
from compresskv.method import LayerInputs, Method
from compresskv.profiles.profile import Profile
from compresskv.registry import register
from compresskv.scoring import heads_window_attention, keep_first, pool, sum_over_window


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
        """The method with a model's head scores."""
        return replace(self, profile=profile)

    def score_layers(self, layers: Sequence[LayerInputs]) -> list[Tensor]:
        """The same (B, 1, T) for every layer."""
        if self.profile is None:
            raise ProfileError("method 'vote' needs a profile of the model: make one with 'compresskv profile MODEL'")
        votes = [self._votes(inputs, self.profile) for inputs in layers]
        vote = torch.stack([one for one in votes if one is not None]).sum(dim=0)
        return [keep_first(vote, self.num_sinks, layers[0].valid)] * len(layers)

    def _votes(self, inputs: LayerInputs, profile: Profile) -> Tensor | None:
        """(B, 1, T): the weighted votes of the layer's heads; None where none of them is among the best."""
        best = profile.ranked_heads(profile.semantic_scores)[: self.num_heads]
        heads = [head for layer, head in best if layer == inputs.layer_idx]
        if not heads:
            return None
        scores = profile.semantic_scores[profile.layer_indices.index(inputs.layer_idx)]
        attention = heads_window_attention(
            inputs.query_window, inputs.keys, heads, scaling=inputs.scaling, softcap=inputs.softcap, valid=inputs.valid
        )
        votes = pool(sum_over_window(attention), self.kernel_size)  # (B, n, T)
        votes /= votes.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(votes.dtype).tiny)
        weights = votes.new_tensor([scores[head] for head in heads])
        return (votes * weights[:, None]).sum(dim=1, keepdim=True)
