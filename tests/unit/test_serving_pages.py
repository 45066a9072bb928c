"""A paged cache read and rearranged by tokens, behind every layout that vLLM gives it, by backends that stand in."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compresskv.errors import ServingError
from compresskv.serving.numbers import FP8
from compresskv.serving.pages import Pages, find_layout

LAYERS, BLOCKS, HEADS, SLOTS, DIM = 3, 7, 2, 4, 8
ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),  # vLLM's default on GPUs
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
"""vLLM's layouts: in which order the dimensions (layers, blocks, heads, slots, channels) lie in memory."""


@dataclass
class Side:
    """Keys and values side by side in the channels, as FlashAttention's backend writes them."""

    transposed: bool = False
    """Channels of neighbouring tokens interleaved, which no strides tell."""

    def do_kv_cache_update(self, layer: Any, keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Write (n, heads, D) each."""
        blocks, within = slots // SLOTS, slots % SLOTS
        if layer.kv_cache_dtype in FP8:
            fp8 = FP8[layer.kv_cache_dtype]
            keys, values = cut_off(keys / layer._k_scale_float, fp8), cut_off(values / layer._v_scale_float, fp8)
        both = torch.cat([keys, values], dim=-1)
        if self.transposed:
            for head, channel in itertools.product(range(HEADS), range(2 * DIM)):
                cache[blocks, head, (within + channel) % SLOTS, channel] = both[:, head, channel]
        else:
            cache[blocks, :, within] = both


def cut_off(numbers: Tensor, fp8: torch.dtype) -> Tensor:
    """The bytes of the next fp8 numbers towards 0, as vLLM's CPU build rounds, uint8."""
    nearest = numbers.float().to(fp8)
    return nearest.view(torch.uint8) - (nearest.float().abs() > numbers.float().abs()).byte()


def make_layer(order: str, *, transposed: bool = False, fp8: str | None = None, scale: float = 1) -> Any:
    """The middle one of three layers that share an allocation."""
    dtype = torch.bfloat16 if fp8 is None else torch.uint8
    sizes, by_place = (LAYERS, BLOCKS, HEADS, SLOTS, 2 * DIM), ORDERS[order]
    memory = torch.zeros([sizes[dim] for dim in by_place], dtype=dtype)
    caches = memory.permute([by_place.index(dim) for dim in range(5)])
    return SimpleNamespace(
        impl=Side(transposed),
        kv_cache=caches[1],
        kv_cache_dtype=fp8 or "auto",
        dtype=torch.bfloat16,
        _k_scale_float=scale,
        _v_scale_float=2 * scale,
        num_kv_heads=HEADS,
        head_size=DIM,
        others=(caches[0], caches[2]),
        memory=memory,
    )


@pytest.fixture(params=[(order, False) for order in ORDERS] + [("LBHNC", True), ("BLNHC", True)], ids=str)
def layer(request: pytest.FixtureRequest) -> Any:
    order, transposed = request.param
    return make_layer(order, transposed=transposed)


def fill(layer: Any, blocks: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens of a request that has these blocks: (n, H, D) keys and values."""
    keys, values = torch.randn(2, num_tokens, HEADS, DIM).to(layer.dtype)
    places = torch.arange(num_tokens)
    slots = torch.tensor(blocks)[places // SLOTS] * SLOTS + places % SLOTS
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
    return keys, values


def read(layer: Any, blocks: list[int], num_tokens: int) -> Tensor:
    """(n, H, 2 D): what a backend of its own would read."""
    if not layer.impl.transposed:
        return layer.kv_cache[blocks].transpose(1, 2).reshape(-1, HEADS, 2 * DIM)[:num_tokens]
    found = torch.empty(len(blocks), SLOTS, HEADS, 2 * DIM, dtype=layer.kv_cache.dtype)
    for slot, channel in itertools.product(range(SLOTS), range(2 * DIM)):
        found[:, slot, :, channel] = layer.kv_cache[blocks][:, :, (slot + channel) % SLOTS, channel]
    return found.reshape(-1, HEADS, 2 * DIM)[:num_tokens]


def test_keys_of_any_tokens_and_heads(layer: Any) -> None:
    blocks = [5, 2, 6, 1]
    keys, _ = fill(layer, blocks, 15)
    pages = Pages(layer, find_layout(layer, SLOTS))
    for start, end in [(0, 15), (0, 4), (3, 5), (8, 15), (14, 15)]:
        assert torch.equal(pages.keys(torch.tensor(blocks), start, end)[0], keys[start:end].transpose(0, 1))
    assert torch.equal(pages.keys(torch.tensor(blocks), 2, 11, slice(1, 2))[0], keys[2:11, 1:].transpose(0, 1))


@pytest.mark.parametrize("targets", [[5, 2], [4, 0]], ids=["in place", "fresh"])
@pytest.mark.parametrize("num_at_once", [1, 3, 100])
def test_tokens_move_and_nothing_else_changes(targets: list[int], num_at_once: int, layer: Any) -> None:
    blocks, positions = [5, 2, 6, 1], [0, 1, 4, 7, 9, 14]
    keys, values = fill(layer, blocks, 15)
    before = layer.memory.clone()
    pages = Pages(layer, find_layout(layer, SLOTS))
    assert torch.equal(layer.memory, before)  # probing writes elsewhere
    pages.move(torch.tensor(blocks), torch.tensor(positions), torch.tensor(targets), num_at_once)
    assert torch.equal(read(layer, targets, 6), torch.cat([keys, values], dim=-1)[positions])
    assert not any(other.any() for other in layer.others)


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [1, 0.037])
@pytest.mark.parametrize("fp8", list(FP8))
def test_fp8(order: str, transposed: bool, scale: float, fp8: str) -> None:
    """Keys are read as attention reads them; bytes move as they are, whatever they mean."""
    layer, blocks = make_layer(order, transposed=transposed, fp8=fp8, scale=scale), [5, 2, 6, 1]
    keys, _ = fill(layer, blocks, 15)
    pages, kept = Pages(layer, find_layout(layer, SLOTS)), cut_off(keys / scale, FP8[fp8]).view(FP8[fp8])
    expected = (kept.to(torch.bfloat16) * scale).transpose(0, 1)
    assert torch.equal(pages.keys(torch.tensor(blocks), 3, 15)[0], expected[:, 3:])
    layer.memory.random_(0, 256)
    positions, before = [0, 1, 4, 7, 9, 14], read(layer, blocks, 15)
    pages.move(torch.tensor(blocks), torch.tensor(positions), torch.tensor([4, 0]), 4)
    assert torch.equal(read(layer, [4, 0], 6), before[positions])


def test_caches_that_are_quantised_in_another_way() -> None:
    layer = make_layer("LBHNC", fp8="fp8_per_token_head")
    with pytest.raises(ServingError, match="a KV cache of fp8_per_token_head"):
        find_layout(layer, SLOTS)
