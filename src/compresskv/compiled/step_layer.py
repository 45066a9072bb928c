"""Cache layers while a decode step is traced: what each kind appends to, and attends to."""

from typing import Any

import torch
from torch import Tensor

from compresskv.attention.plain import AttentionFunction, is_plain, scaling_of
from compresskv.cache.routed import RoutedLayer
from compresskv.compiled.ragged_kernel import ragged_attention, reads_by_kernel
from compresskv.errors import ModelError


class StepLayer(RoutedLayer):
    """A cache layer while a step is traced."""

    def __init__(self, layer_idx: int, config: Any, keys: Tensor, values: Tensor, starts: Tensor, ends: Tensor) -> None:
        super().__init__(layer_idx, config)
        self.keys, self.values, self.is_initialized = keys, values, True
        self._starts, self._ends = starts, ends

    def get_seq_length(self) -> int:
        """Unused: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Unused: no mask is built."""
        return 1, 0


class EvenLayer(StepLayer):
    """KV heads hold equal numbers of tokens, (1, H_kv, n, D), with room behind them."""

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self._end = (self._ends - self._starts)[:1]
        for held, states in zip(self.stored(), (key_states, value_states), strict=True):
            held.index_copy_(2, self._end, states)
        return self.stored()

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One call over all heads."""
        keys, values = self.stored()
        visible = torch.arange(keys.shape[2], device=keys.device) <= self._end
        return attention(query, keys, values, additive(visible[None, None, None], query.dtype))


class RaggedLayer(StepLayer):
    """KV heads have parts of their own in (1, N, D), each with room behind it."""

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        for held, states in zip(self.stored(), (key_states, value_states), strict=True):
            held.index_copy_(1, self._ends, states[:, :, 0])
        return self.stored()

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """All query heads read all parts, and those of other KV heads are masked: one call instead of one a head.

        Raises:
            ModelError: only plain 'sdpa' attention can do that.
        """
        check_ragged(self._model_config, **kwargs)
        keys, values = self.stored()
        if reads_by_kernel(query):
            scaling = scaling_of(query, kwargs.get("scaling"))
            return ragged_attention(query, keys, values, self._starts, self._ends, scaling), None
        column = torch.arange(keys.shape[1], device=keys.device)
        own = (column >= self._starts[:, None]) & (column <= self._ends[:, None])  # (H_kv, N)
        groups = query.shape[1] // own.shape[0]
        visible = own.repeat_interleave(groups, dim=0)[None, :, None]
        return attention(query, keys[:, None], values[:, None], additive(visible, query.dtype))


def check_ragged(config: Any, **kwargs: Any) -> None:
    """Refuse attention that cannot read, with masks, the parts of all KV heads at once.

    Args:
        kwargs: what the attention module gave to its attention function, and itself.
    Raises:
        ModelError: it is not plain 'sdpa' attention.
    """
    if not is_plain_sdpa(config, **kwargs):
        raise ModelError("KV heads hold different numbers of tokens, which only plain sdpa attention can read at once")


def is_plain_sdpa(config: Any, **kwargs: Any) -> bool:
    """Whether nothing but masks and the scaling shapes attention, and sdpa computes it: for kernels, too, see there."""
    return is_plain(**kwargs) and not str(config._attn_implementation).endswith("eager")


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as every attention function takes it."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
