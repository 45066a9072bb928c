"""Caches whose full-attention layers see the attention over their keys."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from compresskv.attention.masks import expect_mask
from compresskv.attention.plain import AttentionFunction
from compresskv.attention.prefill import causal_mask, exact_by_default
from compresskv.attention.routing import await_attention, is_routed
from compresskv.attention.support import CANNOT
from compresskv.errors import CacheStateError, ModelError
from compresskv.models.shape import compressible_layers, decoder_config, shares_keys


class RoutedLayer(DynamicLayer):
    """A cache layer that sees the attention over its keys. Subclasses override `attend`."""

    def __init__(self, layer_idx: int, model_config: PretrainedConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer_idx = layer_idx
        self._model_config = model_config
        self.awaits_attention = False
        self.shares_keys = shares_keys(model_config)
        self.exact_prefill = exact_by_default()
        self.piece_begins_pass = True
        """Whether what it reads next begins a forward pass: later pieces of a prompt do not."""
        self.num_to_come = 0
        """Tokens of this forward pass that come after those that are read now."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutedLayer":
        """A copy bound to the same model: with a config of its own, it could be used outside `compressing`."""
        memo[id(self._model_config)] = self._model_config
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns, offset) of the mask over what is held and the new tokens.

        Args:
            query_length: new tokens, or their positions (transformers before 5.6).
        """
        sizes: tuple[int, int] = super().get_mask_sizes(query_length)  # type: ignore[arg-type]
        expect_mask(sizes[0])
        return sizes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H_kv, T_new, D) and return all that are held.

        Raises:
            CacheStateError: used outside `compressing`.
            ModelError: the model does not pass these keys to its attention function.
        """
        if not is_routed(self._model_config):
            raise CacheStateError(
                "this cache works only inside the 'with compresskv.compressing(...)' that made it, "
                "and with the attention implementation that the model had there"
            )
        self.check_attended()
        keys, values = self._append(key_states, value_states)
        await_attention(self)
        return keys, values

    def check_attended(self) -> None:
        """Raise ModelError if attention did not come by after the last update: it used other keys."""
        if self.awaits_attention:
            raise ModelError(
                f"layer {self.layer_idx}: this model's attention does not use the keys that the cache returns{CANNOT}"
            )

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            old_keys, old_values = self.stored()
            self.keys = torch.cat([old_keys, key_states], dim=-2)
            self.values = torch.cat([old_values, value_states], dim=-2)
        else:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = owned(key_states), owned(value_states)
            self.is_initialized = True
        return self.stored()

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run `attention(query, mask)` over this layer's keys and values; see `Routed.attend`."""
        return attention(query, *self.stored(), mask)

    def attend_shared(
        self, attention: AttentionFunction, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run `attention` for a later layer over all of these keys and values; see `Routed.attend_shared`."""
        num_last, num_keys = query.shape[2], keys.shape[2]
        if mask is None and 1 < num_last < num_keys:
            mask = causal_mask(num_last, num_keys, query.device)
        return attention(query, keys, values, mask)

    def stored(self) -> tuple[Tensor, Tensor]:
        """The keys and values held, (B, H_kv, stored, D) each.

        Raises:
            CacheStateError: nothing was stored yet.
        """
        if self.keys is None or self.values is None:
            raise CacheStateError(f"layer {self.layer_idx} of the cache is empty")
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.awaits_attention = False


class RoutedCache(Cache):
    """A cache whose full-attention layers see the attention over their keys; sliding windows hold their own tokens."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self._first_layer = next(index for index, layer in enumerate(layers) if isinstance(layer, DynamicLayer))
        self.piece_tokens: int | None = None
        """Tokens that a layer reads at once, inside of `routing`; None: all."""

    @contextmanager
    def reading_piece(self, layer_idx: int, num_before: int, num_after: int) -> Iterator[None]:
        """While a layer reads a piece of what this forward pass brings: between so many tokens of it."""
        layer: Any = self.layers[layer_idx]
        layer.piece_begins_pass, layer.num_to_come = num_before == 0, num_after
        try:
            yield
        finally:
            layer.piece_begins_pass, layer.num_to_come = True, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H_kv, T_new, D) and return all that it attends to.

        Raises:
            ModelError: the attention before this did not use the keys that it was given.
            CacheStateError: the forward pass before this one was interrupted, or this one is of another prompt or of
                another number of rows.
        """
        if layer_idx == self._first_layer and getattr(self.layers[layer_idx], "piece_begins_pass", True):
            self._check_rows(len(key_states))
            self._check_goes_on(key_states.shape[-2])
        self.check_attended(layer_idx)
        stored: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if key_states.shape[-2] > 1:
            trim_sliding_window(self.layers[layer_idx])
        return stored

    def check_attended(self, layer_idx: int | None = None) -> None:
        """Raise ModelError if the last layer that sees attention, before `layer_idx`, was updated and saw none."""
        last = next((layer for layer in reversed(self.layers[:layer_idx]) if isinstance(layer, RoutedLayer)), None)
        if last is not None:
            last.check_attended()

    def _check_rows(self, given: int) -> None:
        layer: Any = self.layers[self._first_layer]
        if layer.get_seq_length() and layer.keys is not None and len(layer.keys) != given:
            raise CacheStateError(
                f"the cache holds a batch of {len(layer.keys)}, not of {given}: reset() it before another prompt"
            )

    def _check_goes_on(self, num_new: int) -> None:
        """Refuse to read on where some layers have read more than others: the answer would be wrong, unnoticed.

        Args:
            num_new: tokens that the first layer is given now.
        Raises:
            CacheStateError: a forward pass was interrupted, by the user or for lack of memory.
        """
        layers = [layer for layer in self.layers if isinstance(layer, DynamicLayer)]
        if len({layer.get_seq_length() for layer in layers}) > 1:
            raise CacheStateError("a forward pass on this cache was interrupted: reset() it and read the prompt again")
        for layer in layers:
            if isinstance(layer, RoutedLayer) and layer.awaits_attention:
                raise CacheStateError(
                    f"layer {layer.layer_idx}: what it stored last was not attended to. If a forward pass was "
                    "interrupted, reset() the cache; else the model uses other keys, and cannot be compressed"
                )


def routed_layers(model: PreTrainedModel, make: Callable[[int, int], RoutedLayer]) -> list[Any]:
    """One cache layer for each layer of the model, the full-attention ones made by `make(layer_idx, position)`."""
    with torch.device("cpu"):  # what a sliding window notes at once is moved later, from whatever the user's default is
        layers = list(DynamicCache(config=decoder_config(model)).layers)
    for position, layer_idx in enumerate(compressible_layers(model)):
        layers[layer_idx] = make(layer_idx, position)
    return layers


def trim_sliding_window(layer: Any) -> None:
    """Free what a sliding-window layer has left behind its window.

    It keeps a view of the whole prompt, which would stay in memory until the next token, and in copies of the layer.
    """
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.keys, layer.values = (owned(states) for states in (layer.keys, layer.values) if states is not None)


def owned(states: Tensor) -> Tensor:
    """`states` itself, or a copy where it is a view that would keep a larger tensor alive (fused projections)."""
    if states.untyped_storage().nbytes() > states.nelement() * states.element_size():
        return states.clone(memory_format=torch.contiguous_format)
    return states
