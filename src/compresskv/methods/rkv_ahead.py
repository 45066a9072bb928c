"""R-KV and TriAttention together: what either of them would keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.centred import CentredMethod
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.methods.rkv import RKV
from compresskv.selection.rotation import AHEAD
from compresskv.selection.scores import set_first
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class RKVAhead(RKV, CentredMethod):
    """The better of two ranks: by what the last queries attend to, and by what the model's mean queries will.

    The first is `rkv`'s, which knows what the text is about now; the second `triattention`'s, of a shorter outlook,
    which knows what the model's heads look for at any time. Of tokens with equal better ranks, the other rank decides.

    Source: this project, after R-KV (arXiv 2505.24133) and TriAttention (arXiv 2604.04921).
    """

    name = "rkv_ahead"
    summary = "what `rkv` or `triattention` would keep"
    source = "this project, after arXiv 2505.24133 and 2604.04921"
    limits = ranges(furthest=Range(1, AHEAD[-1]))

    furthest: int = 128

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        ranks = [_ranks(scores, inputs.valid) for scores in (self.wanted_now(inputs), self.wanted_ahead(inputs))]
        better, other = torch.maximum(*ranks), torch.minimum(*ranks)
        return set_first(better + other / inputs.num_tokens, self.num_sinks, torch.inf, inputs.valid)


def _ranks(scores: Tensor, valid: Tensor | None) -> Tensor:
    """How many of a head's tokens have a smaller score (B, H_kv, T), or an equal one and come first; float32."""
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1).float()
