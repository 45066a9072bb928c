"""One layer's paged KV cache by tokens, whatever an attention backend's layout inside a block is.

Backends transpose keys, or interleave those of neighbouring tokens. The layout is found once, by letting the backend
write numbered elements; what it wrote where tells how to read. Writing is left to the backend.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresskv.errors import ServingError

_BASE = 256  # the largest run of whole numbers that bfloat16 holds exactly


@dataclass(frozen=True)
class Layout:
    """Where a block holds what. Offsets count elements from the block's beginning."""

    keys: Tensor
    """(block_size, H_kv, D) int64."""
    values: Tensor
    """(block_size, H_kv, D) int64."""
    key_strides: tuple[int, int, int, int] | None
    """First offset of the keys, then their strides by token, head and dimension; None where there are none such."""

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
    backend, cache = type(layer.impl).__name__, layer.kv_cache
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise ServingError(f"compresskv inside vLLM: attention backend {backend} is not supported")
    shape = (2, block_size, layer.num_kv_heads, layer.head_size)
    num_elements = math.prod(shape)
    digits = torch.arange(1, num_elements + 1, device=cache.device).view(shape)
    scratch, slots = torch.zeros_like(cache[:1]), torch.arange(block_size, device=cache.device)
    found = torch.zeros(scratch[0].numel(), dtype=torch.long, device=cache.device)
    for place in range(math.ceil(math.log(num_elements + 1, _BASE))):
        keys, values = (digits // _BASE**place % _BASE).to(cache.dtype)
        layer.impl.do_kv_cache_update(layer, keys, values, scratch, slots)
        found += scratch.flatten().long() * _BASE**place
    order = found.argsort()[len(found) - num_elements :]  # what is not written stays 0
    if not torch.equal(found[order], digits.flatten()):
        raise ServingError(
            f"compresskv inside vLLM: attention backend {backend} does not store keys and values as they are"
        )
    offsets = order.view(shape)
    return Layout(offsets[0], offsets[1], _strides(offsets[0]))


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


class Pages:
    """A layer's cache."""

    def __init__(self, layer: Any, layout: Layout) -> None:
        self._layer = layer
        self._layout = layout
        cache: Tensor = layer.kv_cache
        if not cache[0].is_contiguous():
            raise ServingError("compresskv inside vLLM: a KV cache whose blocks are not contiguous is not supported")
        self._blocks = cache.flatten(1)  # (blocks, elements of a block), not copied

    def keys(self, block_ids: Tensor, num_tokens: int) -> Tensor:
        """(1, H_kv, num_tokens, D): the keys of the first tokens in `block_ids` (n,)."""
        strides, block_size = self._layout.key_strides, self._layout.block_size
        if strides is None:
            rows = self._blocks[block_ids][:, self._layout.keys.transpose(0, 1)]  # (n, H_kv, block_size, D)
            keys = rows.transpose(0, 1)
        else:
            start, by_token, by_head, by_dim = strides
            num_heads, head_size = self._layout.keys.shape[1:]
            by_block, first = self._blocks.stride(0), self._blocks.storage_offset() + start
            view = self._blocks.as_strided(
                (num_heads, len(self._blocks), block_size, head_size), (by_head, by_block, by_token, by_dim), first
            )
            keys = view[:, block_ids]
        return keys.reshape(keys.shape[0], -1, keys.shape[-1])[None, :, :num_tokens]

    def move(self, block_ids: Tensor, positions: Tensor, targets: Tensor) -> None:
        """Put the tokens at `positions` (ascending) of `block_ids` into the blocks `targets`, in their order."""
        block_size = self._layout.block_size
        blocks, within = block_ids[positions // block_size], positions % block_size
        # all are read before any is written
        keys, values = (
            self._blocks[blocks[:, None, None], offsets[within]] for offsets in (self._layout.keys, self._layout.values)
        )
        places = torch.arange(len(positions), device=positions.device)
        slots = targets[places // block_size] * block_size + places % block_size
        self._layer.impl.do_kv_cache_update(self._layer, keys, values, self._layer.kv_cache, slots)
