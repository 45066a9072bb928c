"""What a method observes a prompt by, beside keys and values, as it comes in one forward pass or several."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compresskv.attention.plain import scaling_of


@dataclass(frozen=True)
class QueryWindow:
    """The queries of the last tokens read, and what else their attention was told."""

    queries: Tensor
    """(B, H_q, W, D), post-RoPE."""
    scaling: float = 1.0
    """Factor on the dot products of queries and keys."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """(H_q,), learned attention sinks."""
    replayed: Tensor | None = None
    """As in `LayerInputs`."""

    @classmethod
    def given(
        cls,
        query: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> "QueryWindow":
        """What one call of an attention function is given."""
        return cls(query, scaling_of(query, scaling), softcap, s_aux)

    def following(self, earlier: "QueryWindow | None") -> "QueryWindow":
        """With the queries of what was read before."""
        if earlier is None:
            return self
        return replace(self, queries=torch.cat([earlier.queries, self.queries], dim=2))

    def last(self, size: int) -> "QueryWindow":
        """The last `size` of them at most, as a copy: a view would keep the whole prompt's queries alive."""
        return replace(self, queries=self.queries[:, :, max(0, self.queries.shape[2] - size) :].clone())

    def cropped(self, num_removed: int) -> "QueryWindow":
        """Without the last ones."""
        return replace(self, queries=self.queries[:, :, : max(0, self.queries.shape[2] - num_removed)])

    def of_rows(self, function: Callable[[Tensor], Tensor]) -> "QueryWindow":
        """With `function` applied to the rows."""
        return replace(self, queries=function(self.queries))
