"""What a compiled step reads of a cache and writes back to it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from compresskv.cache.cache import CompressedCache
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.stores.base import EVEN, RAGGED
from compresskv.compiled.compilable import NotCompilableError
from compresskv.compiled.step import SLIDING, StepInputs, is_ragged


def kinds_of(cache: CompressedCache) -> tuple[str, ...]:
    """Of each layer of a cache.

    Raises:
        NotCompilableError: one is of none.
    """
    layouts = [layer.store.layout for layer in cache.compressed_layers if layer.store is not None]
    if None in layouts:
        raise NotCompilableError("it cannot write into what holds the cache's keys and values")
    if len({layer.store.num_heads for layer in cache.compressed_layers if layer.store is not None}) > 1:
        raise NotCompilableError("its layers have different numbers of KV heads")
    full = RAGGED if RAGGED in layouts else EVEN
    precisions = {layer.store.precision.name: layer.store.precision for layer in cache.compressed_layers if layer.store}
    if len(precisions) > 1:
        raise NotCompilableError("its layers are held in different stores")
    ((name, precision),) = precisions.items()
    if precision.is_packed:
        full = f"{full}:{name}"
    kinds = []
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            kinds.append(full)
        elif type(layer) is DynamicSlidingWindowLayer:
            kinds.append(SLIDING)
        else:
            raise NotCompilableError(f"{type(layer).__name__} is not supported")
    return tuple(kinds)


class Places:
    """Where the parts of a step's inputs begin and new tokens go, on the device.

    A token later they are one further, so nothing is sent there, which would wait for it, until there is new room.
    """

    def __init__(self) -> None:
        self._starts: list[list[int]] = []
        self._ends: list[list[int]] = []
        self._on_device: tuple[Tensor, Tensor] | None = None
        self._growth: Tensor | None = None

    def place(
        self, starts: list[list[int]], ends: list[list[int]], kinds: tuple[str, ...], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Both, (layers, H_kv) int64."""
        growth = [0 if kind == SLIDING else 1 for kind in kinds]
        next_ends = [[end + grown for end in own] for own, grown in zip(self._ends, growth, strict=False)]
        if self._on_device is None or self._growth is None or (starts, ends) != (self._starts, next_ends):
            self._on_device = torch.tensor(starts, device=device), torch.tensor(ends, device=device)
            self._growth = torch.tensor(growth, device=device)[:, None]
        else:
            self._on_device = self._on_device[0], self._on_device[1] + self._growth
        self._starts, self._ends = starts, ends
        return self._on_device


def gather_inputs(
    cache: CompressedCache, token: Tensor, position: Tensor, kinds: tuple[str, ...], places: Places
) -> StepInputs:
    """Make room for one token in every layer, and name where it goes."""
    layers: list[Any] = cache.layers
    keys, values, starts, ends = [], [], [], []
    packed: list[list[Tensor]] = []
    unused = [0] * cache.compressed_layers[0].stored()[0].shape[1]
    for layer, kind in zip(layers, kinds, strict=True):
        if kind == SLIDING:
            held, own_starts, own_ends = [layer.keys.contiguous(), layer.values.contiguous()], unused, unused
            packed.append([])
        else:
            slots = layer.reserve()
            held, own_starts, own_ends = [slots.keys, slots.values], slots.starts, slots.ends
            packed.append(list(slots.packed if is_ragged(kind) else slots.packed[:-1]))
            if kind == RAGGED:
                held = [states.view(len(states), -1, states.shape[-1]) for states in held]
        keys.append(held[0])
        values.append(held[1])
        starts.append(own_starts)
        ends.append(own_ends)
    return StepInputs(token, position, *places.place(starts, ends, kinds, token.device), keys, values, packed)


def store_new_token(cache: CompressedCache, sliding: list[Tensor]) -> None:
    """Count the new token in every layer."""
    states = iter(sliding)
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, CompressedLayer):
            layer.advance()
        else:
            layer.cumulative_length += 1
            layer.keys, layer.values = (next(states)[:, :, 1 - layer.sliding_window :] for _ in range(2))
