"""Compactor: keys that stand apart, and what the tokens around attend to, before and behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection.scores import largest_of_group, mean_over_groups, pool, set_first, window_products
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

_RIDGE = 1e-2
"""Added to the diagonal of the sketch's Gram matrix, which few tokens leave singular."""


@register
@dataclass(frozen=True)
class Compactor(Method):
    """Leverage scores of keys, and attention within chunks without a causal mask, each by its deviation from the mean.

    A key's leverage tells how little the others can stand for it: of the keys before they are turned to their
    positions, less their mean, projected to `sketch_size` random dimensions. Attention is what a token gets from all
    queries of its chunk, times the norm of its value, averaged over the query heads that read a KV head and over three
    tokens. Both are counted in standard deviations over the layer's KV heads, leverage `blending` times. The first
    `num_sinks` tokens and the last `window_size` are always kept. With `defensive`, attention is the largest that a
    token gets from any query of its chunk and any query head, as `largest_of_group` has it.

    Source: Compactor (arXiv 2507.08143), sections 3 and 4. Differs: the random projection is the same in every layer
    and run; logits are scaled as the model scales them, which kvpress's press leaves out. Of the models that have them,
    learned sinks and a cap on logits are left out.
    """

    name = "compactor"
    summary = "keys that stand apart, and attention within chunks, past and future"
    source = "arXiv 2507.08143"
    observes_all = True
    turns_back = True
    limits = ranges(num_sinks=Range(0), chunk_size=Range(1), sketch_size=Range(1), blending=Range(0))

    window_size: int = 4
    num_sinks: int = 8
    chunk_size: int = 256
    sketch_size: int = 48
    blending: float = 0.35
    defensive: bool = False

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        scores = torch.zeros(inputs.keys.shape[:3], dtype=torch.float32, device=inputs.keys.device)
        for row, start in enumerate(inputs.row_starts):
            one = inputs.of_rows([row])
            own = self.blending * _deviations(self._leverage(one, start))
            scores[row, :, start:] = own + _deviations(self._attention(one, start))
        return set_first(scores, self.num_sinks, torch.inf, inputs.valid)

    def _leverage(self, inputs: LayerInputs, start: int) -> Tensor:
        """(H_kv, length)."""
        keys = inputs.turned_back(inputs.keys[0, :, start:])
        generator = torch.Generator().manual_seed(0)
        size = keys.shape[-1], self.sketch_size
        projection = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(keys.device)
        sketch = (keys - keys.mean(dim=1, keepdim=True)) @ (projection / self.sketch_size**0.5)
        gram = sketch.transpose(1, 2) @ sketch
        gram.diagonal(dim1=1, dim2=2).add_(_RIDGE)
        solved: Tensor = torch.linalg.solve(gram, sketch.transpose(1, 2)).transpose(1, 2)
        leverage: Tensor = (sketch * solved).sum(dim=-1)
        return leverage

    def _attention(self, inputs: LayerInputs, start: int) -> Tensor:
        """(H_kv, length)."""
        keys, queries = inputs.keys[:, :, start:], inputs.query_window[:, :, start:]
        received = []
        for first in range(0, keys.shape[2], self.chunk_size):
            chunk = slice(first, first + self.chunk_size)
            logits = window_products(queries[:, :, chunk], keys[:, :, chunk]).mul_(inputs.scaling)
            attention = logits.softmax(dim=-1)
            received.append(attention.amax(dim=2) if self.defensive else attention.sum(dim=2))
        of_group = largest_of_group if self.defensive else mean_over_groups
        attention = of_group(torch.cat(received, dim=-1), keys.shape[1])[0]
        norms = torch.linalg.vector_norm(inputs.values[0, :, start:], dim=-1, dtype=torch.float32)
        return pool((attention * norms)[None], 3)[0]


def _deviations(scores: Tensor) -> Tensor:
    """Scores (H_kv, n) less their mean over all heads and tokens, in standard deviations."""
    return (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-6)
