"""Methods that know where a model's queries lie, without looking at any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskv.methods.inputs import LayerInputs
from compresskv.methods.profiled import ProfiledMethod
from compresskv.selection.centres import centre_scores
from compresskv.selection.rotation import AHEAD
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compresskv.profiles.profile import Profile


class CentredMethod(ProfiledMethod):
    """Base of methods that score keys by the centres of queries. A subclass has the option `furthest`."""

    turns_ahead = True

    furthest: int

    def lacks(self, profile: Profile) -> str | None:
        """Centres."""
        if profile.query_centres is not None:
            return None
        return (
            f"the profile of {profile.model_id} holds no centres of queries, which method {self.name!r} needs: "
            "make a new one with 'compresskv profile MODEL'"
        )

    def wanted_ahead(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T): of the query heads that read a key, the largest score, in standard deviations from its mean.

        Source: TriAttention (arXiv 2604.04921), eqs. 6 to 13.
        """
        scores = torch.zeros(inputs.keys.shape[:3], dtype=torch.float32, device=inputs.keys.device)
        centres, num_offsets = self._centres(inputs, scores), sum(offset <= self.furthest for offset in AHEAD)
        for row, start in enumerate(inputs.row_starts):
            ahead = None if inputs.ahead is None else inputs.ahead[row]
            by_head = centre_scores(inputs.keys[row, :, start:], centres, ahead, num_offsets)
            mean, deviation = by_head.mean(dim=-1, keepdim=True), by_head.std(dim=-1, correction=0, keepdim=True)
            scores[row, :, start:] = ((by_head - mean) / deviation.clamp(min=1e-6)).amax(dim=1)
        return scores

    def _centres(self, inputs: LayerInputs, like: Tensor) -> Tensor:
        """(H_q, 2, D): of the heads that are given; of the kind of `like`."""
        flat = self.measured.query_centres_of(inputs.layer_idx)
        num_heads, head_dim = inputs.query_window.shape[1], inputs.keys.shape[-1]
        by_head = like.new_tensor(flat).view(-1, 2, head_dim)
        return by_head[inputs.first_head : inputs.first_head + num_heads]
