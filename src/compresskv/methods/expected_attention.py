"""Expected attention: what queries to come will attend to, if they are like those of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.methods.base import Method
from compresskv.methods.inputs import FUTURE_POSITIONS, LayerInputs
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.registry import register
from compresskv.selection.scores import largest_of_group, mean_over_groups, set_first
from compresskv.selection.select import select_across_heads
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class ExpectedAttention(Method):
    """The attention that a normal distribution of queries would pay, times the norm of the token's value.

    Mean and covariance are those of all of the prompt's queries but the first `num_sinks`, before they were turned to
    their positions; they are turned by the mean of the turns to the next `num_future` positions. The logarithm of the
    expected exponential of a logit is the mean logit and half of its variance; the softmax over tokens is averaged over
    the query heads that read a KV head. The `num_sinks` first tokens are always kept. KV heads of a layer share by
    AdaKV's rule; `guaranteed=1` gives equal numbers to all of them. With `defensive`, the largest over the query heads
    takes the place of their mean, as `largest_of_group` has it.

    Source: Expected Attention (arXiv 2510.00636), sections 3.1 to 3.3. A model without rotary position embeddings has
    nothing to turn back; of one that has them, learned sinks and a cap on logits are left out.
    """

    name = "expected_attention"
    summary = "what queries like the prompt's would attend to; KV heads share"
    source = "arXiv 2510.00636"
    observes_all = True
    turns_back = True
    limits = ranges(num_future=Range(1, FUTURE_POSITIONS), num_sinks=Range(0), guaranteed=Range(0, 1))

    num_future: int = 512
    num_sinks: int = 4
    guaranteed: float = 0.2
    defensive: bool = False

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, H_kv, T)."""
        scores = torch.zeros(inputs.keys.shape[:3], dtype=torch.float32, device=inputs.keys.device)
        for row, start in enumerate(inputs.row_starts):
            scores[row, :, start:] = self._row(inputs.of_rows([row]), start)
        return set_first(scores, self.num_sinks, torch.inf, inputs.valid)

    def _row(self, inputs: LayerInputs, start: int) -> Tensor:
        """(H_kv, length) of a row whose first `start` tokens are padding."""
        keys, values = inputs.keys[0, :, start:].float(), inputs.values[0, :, start:]
        (num_kv_heads, length, head_dim), queries = keys.shape, inputs.turned_back(inputs.query_window[0, :, start:])
        queries = queries[:, min(self.num_sinks, length - 1) :]
        mean = queries.mean(dim=1)
        centred = queries - mean[:, None]
        covariance = centred.transpose(1, 2) @ centred / queries.shape[1]
        if inputs.rotation is not None:
            future = torch.arange(self.num_future, device=keys.device) + inputs.first_position + length
            turn = inputs.rotation.mean_matrix(future)
            mean, covariance = mean @ turn, turn.T @ covariance @ turn
        mean = mean.view(num_kv_heads, -1, 1, head_dim)
        covariance = covariance.view(num_kv_heads, -1, head_dim, head_dim)
        logits = (mean * keys[:, None]).sum(dim=-1) * inputs.scaling  # (H_kv, G, length)
        logits += ((keys[:, None] @ covariance) * keys[:, None]).sum(dim=-1) * (inputs.scaling**2 / 2)
        each = logits[..., self.num_sinks :].softmax(dim=-1).flatten(0, 1)[None]  # of query heads
        attention = (largest_of_group if self.defensive else mean_over_groups)(each, num_kv_heads)[0]
        attention = torch.nn.functional.pad(attention, (length - attention.shape[-1], 0))
        norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        return attention * norms

    def select(self, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]) -> Tensor:
        """(B, H_kv, R)."""
        return select_across_heads(scores, budgets, self.window_size, row_lengths, self.guaranteed)
