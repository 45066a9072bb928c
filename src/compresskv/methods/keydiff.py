"""KeyDiff: keys that differ most from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.registry import register
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class KeyDiff(Method):
    """The keys that are least like the mean of all keys of their KV head, each of length 1, by their cosine with it.

    Source: KeyDiff (arXiv 2504.15364), section 3. The question plays no part. Differs: the whole prompt is at hand, so
    nothing is evicted block by block.
    """

    name = "keydiff"
    summary = "keys least like the mean key, a choice per KV head"
    source = "arXiv 2504.15364"

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        keys = torch.nn.functional.normalize(inputs.keys.float(), dim=-1)
        if inputs.valid is not None:
            keys = keys * inputs.valid[:, None, :, None]
        return -torch.nn.functional.cosine_similarity(keys, keys.sum(dim=2, keepdim=True), dim=-1)
