"""KNorm: keys with a small norm attract attention."""

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
class KNorm(Method):
    """The keys with the smallest L2 norm, in each KV head.

    Source: Devoto et al. (arXiv 2406.11430), section 3. The question plays no part.
    """

    name = "knorm"
    summary = "keys with the smallest norm, a choice per KV head"
    source = "arXiv 2406.11430"

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        norms: Tensor = torch.linalg.vector_norm(inputs.keys, dim=-1, dtype=torch.float32)
        return -norms
