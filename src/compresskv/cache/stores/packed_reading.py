"""Attention of one token over packed keys and values whose codes are multiplied as they are."""

import torch
from torch import Tensor

from compresskv.cache.stores.packed_states import PackedStates
from compresskv.cache.stores.packed_vectors import PackedVectors
from compresskv.system.precise import precisely


@precisely
def attend_to_codes(
    keys: PackedStates, values: PackedStates, tails: tuple[Tensor, Tensor], query: Tensor, scaling: float
) -> Tensor:
    """Plain attention, without a layer's numbers ever being written down: a score is the product with the codes, times
    their step, and what all codes of a vector, or of a head, have in common.

    Args:
        tails: keys and values (B, H_kv, T, D) beside what is packed.
        query: (B, H_q, 1, D).
        scaling: factor on the dot products.
    Returns: (B, 1, H_q, D), in the query's dtype.
    """
    num_heads = len(keys.counts)
    given = scaling * query.float()
    turned = keys.turned_queries(given).unflatten(1, (num_heads, -1))[..., 0, :]  # (B, H_kv, G, D)
    grouped = given.unflatten(1, (num_heads, -1))[..., 0, :]
    tail_keys, tail_values = (tail.float() for tail in tails)
    new = grouped @ tail_keys.transpose(-1, -2)
    outputs = []
    for heads, key_vectors, value_vectors in _parts(keys, values):
        own, centre = turned[:, heads], _centre(keys, heads)
        old = _products(own, key_vectors)
        if centre is not None:
            old += (own * centre).sum(dim=-1, keepdim=True)
        num_old = old.shape[-1]
        weights = torch.cat([old, new[:, heads]], dim=-1).softmax(dim=-1)
        packed = _weighted(weights[..., :num_old], value_vectors)
        centre = _centre(values, heads)
        if centre is not None:
            packed = values.turned_output(packed + centre * weights[..., :num_old].sum(dim=-1, keepdim=True))
        outputs.append(packed + weights[..., num_old:] @ tail_values[:, heads])
    return torch.cat(outputs, dim=1).flatten(1, 2)[:, None].to(query.dtype)


def _parts(keys: PackedStates, values: PackedStates) -> list[tuple[slice, PackedVectors, PackedVectors]]:
    """KV heads, and their vectors (B, heads, n, D): all at once where they hold as many."""
    counts = keys.counts
    if len(set(counts)) == 1:
        return [(slice(None), keys.vectors.by_head(len(counts)), values.vectors.by_head(len(counts)))]
    pairs = zip(keys.vectors.split(counts), values.vectors.split(counts), strict=True)
    return [(slice(head, head + 1), one.by_head(1), other.by_head(1)) for head, (one, other) in enumerate(pairs)]


def _centre(states: PackedStates, heads: slice) -> Tensor | None:
    """(B, heads, 1, D)"""
    return None if states.centre is None else states.centre[:, heads, None].float()


def _products(query: Tensor, vectors: PackedVectors) -> Tensor:
    """(B, heads, G, n) of queries (B, heads, G, D)."""
    low, step = vectors.ranges.float().unbind(dim=-1)
    planes = vectors.planes()
    pairs = zip(query.chunk(len(planes), dim=-1), planes, strict=True)
    products = sum(own @ plane.transpose(-1, -2) for own, plane in pairs)
    return torch.addcmul(products * step[:, :, None], query.sum(dim=-1, keepdim=True), low[:, :, None])


def _weighted(weights: Tensor, vectors: PackedVectors) -> Tensor:
    """(B, heads, G, D), sums by weights (B, heads, G, n)."""
    low, step = vectors.ranges.float().unbind(dim=-1)
    steps = weights * step[:, :, None]
    codes = torch.cat([steps @ plane for plane in vectors.planes()], dim=-1)
    return codes + (weights * low[:, :, None]).sum(dim=-1, keepdim=True)
