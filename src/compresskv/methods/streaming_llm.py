"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection.scores import set_first
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class StreamingLLM(Method):
    """The first `num_sinks` tokens and the most recent b - num_sinks. A budget within the sinks keeps sinks only.

    Source: StreamingLLM (arXiv 2309.17453), section 3. Differs: positions are the true ones, not re-numbered inside
    the cache, since the prompt has been read in full and nothing rolls on.
    """

    name = "streaming_llm"
    summary = "first 4 tokens and the most recent ones"
    source = "arXiv 2309.17453"
    shares_positions = True
    limits = ranges(num_sinks=Range(0))

    num_sinks: int = 4

    def score(self, inputs: LayerInputs) -> Tensor:
        """The later the better, sinks best of all."""
        queries = inputs.query_window
        recency = torch.arange(inputs.num_tokens, dtype=torch.float32, device=queries.device)
        return set_first(recency.repeat(len(queries), 1, 1), self.num_sinks, torch.inf, inputs.valid)
