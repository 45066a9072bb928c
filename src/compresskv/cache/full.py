"""A cache that keeps everything, made of layers that watch the attention over them."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from compresskv.cache.routed import RoutedCache, RoutedLayer, routed_layers

C = TypeVar("C", bound=Cache)


class FullCache(RoutedCache):
    """A full cache whose full-attention layers are made by `make(layer_idx, position)`."""

    def __init__(self, model: PreTrainedModel, make: Callable[[int, int], RoutedLayer]) -> None:
        super().__init__(layers=routed_layers(model, make))

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
