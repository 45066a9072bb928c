"""One layer's paged KV cache by tokens, whatever an attention backend's layout is.

vLLM gives each layer a logical cache, (blocks, heads, slots, channels), with strides of several layouts behind it, and
backends transpose keys within, or interleave those of neighbouring tokens. Where an element lies is found once, by
letting the backend write numbered elements; what it wrote where tells how to read, and where to move what was read.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresskv.errors import ServingError
from compresskv.serving.numbers import Numbers


@dataclass(frozen=True)
class Layout:
    """What a block holds where, by places of its logical elements in their row-major order."""

    keys: Tensor
    """(block_size, H_kv, D) int64."""
    values: Tensor
    """(block_size, H_kv, D) int64."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.keys.shape[0]


def find_layout(layer: Any, block_size: int) -> Layout:
    """The layout of a layer's cache.

    Args:
        layer: vLLM's Attention, with its cache.
    Raises:
        ServingError: the backend writes its cache within attention, or does not write every element as it is.
    """
    backend, cache, numbers = type(layer.impl).__name__, layer.kv_cache, Numbers.of(layer)
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise ServingError(f"compresskv inside vLLM: attention backend {backend} is not supported")
    shape = (2, block_size, layer.num_kv_heads, layer.head_size)
    num_elements = math.prod(shape)
    digits = torch.arange(1, num_elements + 1, device=cache.device).view(shape)
    scratch, slots = torch.zeros_like(cache[:1]), torch.arange(block_size, device=cache.device)
    found = torch.zeros(scratch[0].numel(), dtype=torch.long, device=cache.device)
    base = numbers.base
    for place in range(math.ceil(math.log(num_elements + 1, base))):
        keys, values = numbers.to_write(digits // base**place % base)
        layer.impl.do_kv_cache_update(layer, keys, values, scratch, slots)
        found += numbers.written(scratch.flatten()) * base**place
    order = found.argsort()[len(found) - num_elements :]  # what is not written stays 0
    if not torch.equal(found[order], digits.flatten()):
        raise ServingError(
            f"compresskv inside vLLM: attention backend {backend} does not store keys and values as they are"
        )
    places = order.view(shape)
    return Layout(places[0], places[1])


class Pages:
    """A layer's cache."""

    def __init__(self, layer: Any, layout: Layout) -> None:
        self._numbers = Numbers.of(layer)
        self._block_size = layout.block_size
        self._keys, self._values = (_Elements(layer.kv_cache, places) for places in (layout.keys, layout.values))

    def keys(self, block_ids: Tensor, start: int, end: int, heads: slice = slice(None)) -> Tensor:
        """(1, h, end - start, D): keys of the tokens from `start` to `end` in `block_ids` (n,), of some KV heads.

        In the dtype that the model computes in.
        """
        first = start // self._block_size
        blocks = block_ids[first : -(-end // self._block_size)]
        offset = first * self._block_size
        return self._numbers.keys(self._keys.of_blocks(blocks, heads)[None, :, start - offset : end - offset])

    def move(self, block_ids: Tensor, positions: Tensor, targets: Tensor, num_at_once: int) -> None:
        """Put the tokens at `positions` (ascending) of `block_ids` into the blocks `targets`, in their order.

        What lies in the cache moves as it is: nothing is rounded again.
        The targets are the first of `block_ids`, or others. Pieces of `num_at_once` tokens are read before they are
        written; a token never moves back, so none is written where a later piece reads.
        """
        for start in range(0, len(positions), num_at_once):
            places = torch.arange(start, min(start + num_at_once, len(positions)), device=positions.device)
            moved = positions[places]
            old = block_ids[moved // self._block_size], moved % self._block_size
            new = targets[places // self._block_size], places % self._block_size
            for elements in (self._keys, self._values):
                elements.put(*new, elements.of_tokens(*old))


class _Elements:
    """The keys or the values in a cache.

    Args:
        cache: (blocks, ...), of any strides.
        places: (block_size, H_kv, D), see `Layout`.
    """

    def __init__(self, cache: Tensor, places: Tensor) -> None:
        offsets = torch.zeros_like(places)
        for size, stride in zip(reversed(cache.shape[1:]), reversed(cache.stride()[1:]), strict=True):
            offsets += places % size * int(stride)
            places = places // int(size)
        self._cache, self._offsets = cache, offsets
        self._view: Tensor | None = None
        """(blocks, block_size, H_kv, D), where strides tell it all."""
        if (found := _strides(offsets)) is not None:
            start, *strides = found
            self._view = cache.as_strided(
                (len(cache), *offsets.shape), (cache.stride(0), *strides), cache.storage_offset() + start
            )

    def of_blocks(self, blocks: Tensor, heads: slice) -> Tensor:
        """(h, n * block_size, D): what lies in `blocks` (n,), by heads."""
        if self._view is not None:
            found = self._view.permute(2, 0, 1, 3)[heads][:, blocks]
        else:
            offsets = self._offsets.transpose(0, 1)[heads]  # (h, block_size, D)
            found = self._flat()[self._places(blocks, offsets[:, None])]
        return found.reshape(found.shape[0], -1, found.shape[-1])

    def of_tokens(self, blocks: Tensor, within: Tensor) -> Tensor:
        """(n, H_kv, D): one token of each of `blocks` (n,)."""
        if self._view is not None:
            return self._view[blocks, within]
        return self._flat()[self._places(blocks, self._offsets[within])]

    def put(self, blocks: Tensor, within: Tensor, elements: Tensor) -> None:
        """Write what `of_tokens` reads."""
        if self._view is not None:
            self._view[blocks, within] = elements
        else:
            self._flat()[self._places(blocks, self._offsets[within])] = elements

    def _places(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """In memory, of the elements at `offsets` (..., n or 1, x, y) from the beginnings of `blocks` (n,)."""
        beginnings: Tensor = blocks * int(self._cache.stride(0)) + int(self._cache.storage_offset())
        return beginnings[..., None, None] + offsets

    def _flat(self) -> Tensor:
        """The memory behind the cache, element by element."""
        num_elements = self._cache.untyped_storage().nbytes() // self._cache.element_size()
        return self._cache.as_strided((num_elements,), (1,), 0)


def _strides(offsets: Tensor) -> tuple[int, int, int, int] | None:
    """The first offset and one stride a dimension, where they say it all."""
    start = int(offsets[0, 0, 0])
    strides = [
        int(offsets.select(dim, min(1, size - 1)).flatten()[0]) - start for dim, size in enumerate(offsets.shape)
    ]
    expected = offsets.new_tensor(start)
    for dim, size in enumerate(offsets.shape):
        steps = torch.arange(size, device=offsets.device) * strides[dim]
        expected = expected + steps.view([-1 if other == dim else 1 for other in range(3)])
    return (start, *strides) if torch.equal(expected, offsets) else None  # type: ignore[return-value]
