"""A cache that keeps everything, made of layers that watch the attention over them."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from compresskv.attention import RoutedLayer
from compresskv.cache import own_window, routed_layers

C = TypeVar("C", bound=Cache)


class FullCache(Cache):
    """A full cache whose full-attention layers are made by `make(layer_idx, position)`."""

    def __init__(self, model: PreTrainedModel, make: Callable[[int, int], RoutedLayer]) -> None:
        super().__init__(layers=routed_layers(model, make))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H_kv, T_new, D) and return all that it attends to."""
        stored: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if key_states.shape[-2] > 1:
            own_window(self.layers[layer_idx])
        return stored

    @property
    def routed(self) -> list[Any]:
        """The full-attention layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, RoutedLayer)]

    def branch(self) -> "FullCache":
        """A cache that goes on from here and leaves this one as it is.

        Attention layers share their tensors with it: they grow by making new ones.
        """
        return branch(self)


def branch(cache: C) -> C:
    """A cache that goes on from here and leaves `cache` as it is, without copying keys and values.

    Attention layers share their tensors with it: they grow by making new ones.
    """
    branched = copy.copy(cache)
    branched.layers = [
        copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer) for layer in cache.layers
    ]
    return branched
