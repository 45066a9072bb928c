"""One decode step, tensors in and tensors out: what a compiler takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from compresskv.attention.routing import AttentionFunction, is_plain, without_masks
from compresskv.cache.routed import RoutedLayer
from compresskv.errors import ModelError
from compresskv.models.shape import decoder_config

EVEN, RAGGED, SLIDING = "even", "ragged", "sliding"
"""Kinds of layers: KV heads that hold equal numbers of tokens, KV heads that need not, and a sliding window."""


@dataclass(frozen=True)
class StepInputs:
    """What one step reads, beside the weights. One sequence.

    For an even layer keys and values are (1, H_kv, n, D), with room behind the tokens held. For a ragged one they are
    (1, N, D), in which each KV head has a part. For a sliding one they are the tokens held, (1, H_kv, n, D).
    """

    token: Tensor
    """(1, 1) int64."""
    position: Tensor
    """(1, 1) int64: how many tokens were seen before."""
    starts: Tensor
    """(layers, H_kv) int64, where each KV head's part begins; of even layers only the differences to `ends` count."""
    ends: Tensor
    """(layers, H_kv) int64, where its new token goes."""
    keys: list[Tensor]
    values: list[Tensor]

    def as_args(self) -> tuple[Any, ...]:
        """In the order of `Step.forward`."""
        return self.token, self.position, self.starts, self.ends, self.keys, self.values


class Step(nn.Module):
    """A model that reads one token with what its cache layers hold."""

    def __init__(
        self, model: PreTrainedModel, kinds: tuple[str, ...], narrow: Mapping[str, Tensor] | None = None
    ) -> None:
        """A step of a model.

        Args:
            kinds: of its layers.
            narrow: float32 weights that are read in 16 bits and widened, by their names in the model.
        """
        super().__init__()
        self.model = model
        self._kinds = kinds
        self._narrow = narrow_names(narrow or {})
        for own, name in self._narrow.items():
            self.register_buffer(own, (narrow or {})[name])

    def forward(
        self,
        token: Tensor,
        position: Tensor,
        starts: Tensor,
        ends: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Write the token's keys and values into even and ragged layers.

        Returns: the next token's logits (1, vocab); the keys and values of sliding layers, the new token's included.
        """
        config = decoder_config(self.model)
        layers: list[Any] = []
        for layer_idx, kind in enumerate(self._kinds):
            held = keys[layer_idx], values[layer_idx]
            if kind == SLIDING:
                layers.append(_sliding_layer(*held))
            else:
                make = _EvenLayer if kind == EVEN else _RaggedLayer
                layers.append(make(layer_idx, config, *held, starts[layer_idx], ends[layer_idx]))
        widened = {name: getattr(self, own).float() for own, name in self._narrow.items()}
        cache = Cache(layers=layers)
        inputs = {"input_ids": token, "position_ids": position, "past_key_values": cache, "use_cache": True}
        with without_masks():
            output = functional_call(self.model, widened, kwargs=inputs) if widened else self.model(**inputs)
        sliding = [layer for layer in layers if not isinstance(layer, _StepLayer)]
        return output.logits[:, -1], [states for layer in sliding for states in (layer.keys, layer.values)]


def narrow_names(narrow: Iterable[str]) -> dict[str, str]:
    """Under which name `Step` has each narrow weight."""
    return {f"narrow_{place}": name for place, name in enumerate(narrow)}


class _StepLayer(RoutedLayer):
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


class _EvenLayer(_StepLayer):
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self._end = (self._ends - self._starts)[:1]
        for held, states in zip(self.stored(), (key_states, value_states), strict=True):
            held.index_copy_(2, self._end, states)
        return self.stored()

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = self.stored()
        visible = torch.arange(keys.shape[2], device=keys.device) <= self._end
        return attention(query, keys, values, _additive(visible[None, None, None], query.dtype))


class _RaggedLayer(_StepLayer):
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
        if not is_plain(**kwargs) or not str(self._model_config._attn_implementation).endswith("sdpa"):
            raise ModelError(
                "KV heads hold different numbers of tokens, which only plain sdpa attention can read at once"
            )
        keys, values = self.stored()
        column = torch.arange(keys.shape[1], device=keys.device)
        own = (column >= self._starts[:, None]) & (column <= self._ends[:, None])  # (H_kv, N)
        groups = query.shape[1] // own.shape[0]
        visible = own.repeat_interleave(groups, dim=0)[None, :, None]
        return attention(query, keys[:, None], values[:, None], _additive(visible, query.dtype))


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as every attention function takes it."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _sliding_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Attends to all that it holds and to the new token; the caller drops what has left the window."""
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    layer.dtype, layer.device = keys.dtype, keys.device
    return layer
