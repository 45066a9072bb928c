"""What a method is given of a layer, and what layers tell one another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compresskv.selection.scores import heads_window_attention, sum_over_window, window_attention, window_moments
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compresskv.selection.rotation import Rotation

FUTURE_POSITIONS = 4096
"""How many positions behind the prompt a method may turn queries to."""


@dataclass(frozen=True)
class LayerInputs:
    """What a method may look at in one layer at the end of prefill. Tensors only: methods never see the model."""

    layer_idx: int
    """The layer's number in the model."""
    query_window: Tensor
    """(B, H_q, W, D), post-RoPE: the queries of the last W tokens, those looked ahead at included; all T if the method
    `observes_all`. At a cut in the middle of a prompt, those of its end, read behind the T tokens."""
    keys: Tensor
    """(B, H_kv, T, D), post-RoPE."""
    values: Tensor
    """(B, H_kv, T, D)."""
    scaling: float
    """Factor on the dot products of queries and keys."""
    softcap: float | None = None
    """Gemma 2's cap on attention logits."""
    valid: Tensor | None = None
    """(B, T) bool, False at padding; None where nothing is padded."""
    first_head: int = 0
    """The number in the model of the first query head given here: ranks of tensor parallelism hold some each."""
    sinks: Tensor | None = None
    """(H_q,), learned attention sinks: logits that take a share of every query's attention, as in gpt-oss."""
    num_ahead: int = 0
    """How many of the last tokens are generated ones that are looked ahead at. They are kept, beside the budget."""
    replayed: Tensor | None = None
    """(B, H_kv, T) float32: the largest attention that each token gets while the text is read once more; None where it
    is not. See `compresskv.plans.replay`."""
    rotation: Rotation | None = None
    """How queries and keys are turned to T positions and `FUTURE_POSITIONS` more; None where the method does not ask,
    or the model has no rotary position embedding that can be told."""
    first_position: int = 0
    """The position of the first of the T tokens: a document may be cut in parts."""
    positions: Tensor | None = None
    """(B, 1 or H_kv, T) int64, ascending: where in the text the tokens are that earlier cuts of its prompt left; None
    where there was no such cut. The last token read is always among them."""
    ahead: tuple[Rotation, ...] | None = None
    """For each row, how queries are turned that come later, one row for each of `compresskv.selection.rotation.AHEAD`;
    None as for `rotation`."""

    @property
    def row_starts(self) -> list[int]:
        """For each row, how much padding precedes it."""
        if self.valid is None:
            return [0] * len(self.keys)
        starts: list[int] = (~self.valid).sum(dim=-1).tolist()
        return starts

    def turned_back(self, states: Tensor) -> Tensor:
        """Queries or keys (..., n, D) of a row without its padding, as they were before they were turned; float32."""
        if self.rotation is None:
            return states.float()
        positions = torch.arange(states.shape[-2], device=states.device) + self.first_position
        return self.rotation.undone(states, positions)

    def of_rows(self, rows: list[int]) -> LayerInputs:
        """The same of some rows of the batch."""
        query_window, keys, values = self.query_window[rows], self.keys[rows], self.values[rows]
        valid = None if self.valid is None else self.valid[rows]
        ahead = None if self.ahead is None else tuple(self.ahead[row] for row in rows)
        positions = None if self.positions is None else self.positions[rows]
        own = replace(self, query_window=query_window, keys=keys, values=values, valid=valid)
        return replace(own, positions=positions, ahead=ahead)

    def with_window(self, window_size: int) -> LayerInputs:
        """The same, observed by no more than the last `window_size` queries."""
        if self.query_window.shape[2] <= window_size:
            return self
        return replace(self, query_window=self.query_window[:, :, self.query_window.shape[2] - window_size :])

    @property
    def num_kv_heads(self) -> int:
        """H_kv."""
        return self.keys.shape[1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.keys.shape[2]

    @property
    def window_attention(self) -> Tensor:
        """(B, H_q, W, T): attention of the window's queries; see `compresskv.selection.scores.window_attention`."""
        return window_attention(self.query_window, self.keys, **self._terms)

    def attention_sums(self, head_indices: list[int]) -> Tensor:
        """(B, n, T): the attention that tokens get from the whole window in some query heads; 0 for its own tokens."""
        return sum_over_window(heads_window_attention(self.query_window, self.keys, head_indices, **self._terms))

    @property
    def _terms(self) -> dict[str, Any]:
        """What dot products become attention by."""
        return {"scaling": self.scaling, "softcap": self.softcap, "valid": self.valid, "sinks": self.sinks}

    @cached_property
    def attention_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of attention over the window's queries, (B, H_q, T) each; 0 for the window's own tokens.

        Kept, since budgets and scores may both need them: treat them as read-only.
        """
        return window_moments(self.window_attention)


@dataclass(frozen=True)
class Observation:
    """What one layer tells the others, where a method `decides_together`. Small beside the layer's keys and values."""

    layer_idx: int
    """The layer's number in the model."""
    valid: Tensor | None
    """(B, T) bool, False at padding; None where nothing is padded."""
    scores: Tensor | None = None
    """(B, H_kv or 1, T) float32: the layer's own scores."""
    vote: Tensor | None = None
    """(B, 1, T) float32: the sum of the votes of the layer's heads; None where none of them votes. Where there are
    `positions`, it is over all of the text, evicted tokens included."""
    positions: Tensor | None = None
    """As in `LayerInputs`, where layers and KV heads may hold different tokens."""
    preference: Tensor | None = None
    """(B,): how much of the budget the layer should have."""

    def to(self, device: torch.device) -> Observation:
        """The same on a device, for layers that lie on several."""
        tensors = {name: getattr(self, name) for name in ("valid", "scores", "vote", "positions", "preference")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})
