"""TriAttention: what queries like all of the model's queries would attend to, from the positions that come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.inputs import LayerInputs
from compresskv.methods.profiled import ProfiledMethod
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection.centres import centre_scores
from compresskv.selection.rotation import AHEAD
from compresskv.selection.scores import set_first
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compresskv.profiles.profile import Profile


@register
@dataclass(frozen=True)
class TriAttention(ProfiledMethod):
    """Logits of the mean query of each head, as it would stand at positions to come, plus what its spread may add.

    A head's queries lie around one centre before they are turned to their positions; the profile holds it, measured
    once. No query is looked at while a text is cut. A key's score is the mean over 1, 2, 4 ... up to `furthest` tokens
    ahead of the centre's logit, plus the key's norms weighed by how far queries scatter; of the query heads that read
    it, each in standard deviations from its mean over all that is held, the largest counts.

    Source: TriAttention (arXiv 2604.04921), section 4, eqs. 6 to 13. Differs: the `num_sinks` first tokens are always
    kept; each KV head of each layer chooses for itself. A model without rotary position embeddings turns nothing.
    """

    name = "triattention"
    summary = "what the model's mean queries would attend to from later positions"
    source = "arXiv 2604.04921"
    turns_ahead = True
    limits = ranges(num_sinks=Range(0), furthest=Range(1, AHEAD[-1]))

    num_sinks: int = 4
    furthest: int = AHEAD[-1]

    def lacks(self, profile: Profile) -> str | None:
        """Centres."""
        if profile.query_centres is not None:
            return None
        return (
            f"the profile of {profile.model_id} holds no centres of queries, which method {self.name!r} needs: "
            "make a new one with 'compresskv profile MODEL'"
        )

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        scores = torch.zeros(inputs.keys.shape[:3], dtype=torch.float32, device=inputs.keys.device)
        centres, num_offsets = self._centres(inputs, scores), sum(offset <= self.furthest for offset in AHEAD)
        for row, start in enumerate(inputs.row_starts):
            ahead = None if inputs.ahead is None else inputs.ahead[row]
            by_head = centre_scores(inputs.keys[row, :, start:], centres, ahead, num_offsets)
            mean, deviation = by_head.mean(dim=-1, keepdim=True), by_head.std(dim=-1, correction=0, keepdim=True)
            scores[row, :, start:] = ((by_head - mean) / deviation.clamp(min=1e-6)).amax(dim=1)
        return set_first(scores, self.num_sinks, torch.inf, inputs.valid)

    def _centres(self, inputs: LayerInputs, like: Tensor) -> Tensor:
        """(H_q, 2, D): of the heads that are given; of the kind of `like`."""
        flat = self.measured.query_centres_of(inputs.layer_idx)
        num_heads, head_dim = inputs.query_window.shape[1], inputs.keys.shape[-1]
        by_head = like.new_tensor(flat).view(-1, 2, head_dim)
        return by_head[inputs.first_head : inputs.first_head + num_heads]
