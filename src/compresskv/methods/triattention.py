"""TriAttention: what queries like all of the model's queries would attend to, from the positions that come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.centred import CentredMethod
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection.rotation import AHEAD
from compresskv.selection.scores import set_first
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class TriAttention(CentredMethod):
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
    limits = ranges(num_sinks=Range(0), furthest=Range(1, AHEAD[-1]))

    num_sinks: int = 4
    furthest: int = AHEAD[-1]

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        return set_first(self.wanted_ahead(inputs), self.num_sinks, torch.inf, inputs.valid)
