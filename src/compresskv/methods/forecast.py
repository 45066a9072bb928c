"""The forecast: what a second reading of the text would attend to, told from keys and values alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.inputs import LayerInputs
from compresskv.methods.profiled import ProfiledMethod
from compresskv.methods.registry import register
from compresskv.methods.together import RankedTogether
from compresskv.selection.forecast import replay_features
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compresskv.profiles.profile import Profile


@register
@dataclass(frozen=True)
class Forecast(RankedTogether, ProfiledMethod):
    """`kvzip`'s scores without the replay: their logarithms are forecast by one product for each KV head.

    The profile holds the weights, fitted to replays of calibration texts (`compresskv.selection.forecast`). Tokens of
    all layers and KV heads are ranked in one list, as in `kvzip`.

    Source: this project; that such scores can be told from what the model computes anyway is KVzap's finding (arXiv
    2601.07891), which trains on hidden states.
    """

    name = "forecast"
    summary = "what a second reading would attend to, told from keys and values"
    source = "this project"
    ours = True
    turns_back = True

    def lacks(self, profile: Profile) -> str | None:
        """Weights."""
        if profile.replay_weights is not None:
            return None
        return (
            f"the profile of {profile.model_id} was made before method {self.name!r} needed more of it: make a "
            "new one with 'compresskv profile MODEL', or take 'kvzip', which needs none and reads the text twice"
        )

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        flat = self.measured.replay_weights_of(inputs.layer_idx)
        scores = torch.zeros(inputs.keys.shape[:3], dtype=torch.float32, device=inputs.keys.device)
        weights = scores.new_tensor(flat).view(inputs.num_kv_heads, -1, 1)
        for row, start in enumerate(inputs.row_starts):
            keys, values = inputs.turned_back(inputs.keys[row, :, start:]), inputs.values[row, :, start:]
            scores[row, :, start:] = (replay_features(keys, values) @ weights)[..., 0]
        return scores
