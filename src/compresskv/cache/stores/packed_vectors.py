"""Vectors in 8, 4 or 2 bits a number, each with a range of its own."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskv.errors import ModelError

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST_STEP = 2.0**-24
"""Of float16: below, all of a vector's numbers are taken to be equal."""
_LONGEST = 2.0
"""Times its length that a key may get: usual ones get a seventh."""
_AT_ONCE = 512
"""Vectors that are fitted together: what that takes meanwhile should fit into a core's cache."""
_AT_ONCE_ELSEWHERE = 65536
"""The same on a GPU, where each call costs as much as many vectors."""
_GAUSSIAN_STEP = 0.9957
"""Between four codes that err least on normally distributed numbers, in their standard deviation (Max, 1960)."""


@dataclass(frozen=True)
class PackedVectors:
    """Numbers as codes: a number is its vector's lowest one, and its code times the vector's step."""

    codes: Tensor
    """(..., D * bits / 8) uint8. Byte i holds number i in its lowest bits, above it number i + D * bits / 8, ..."""
    ranges: Tensor
    """(..., 2) float16: each vector's lowest number, and its step."""
    bits: int

    @classmethod
    def of(cls, vectors: Tensor, bits: int, *, are_keys: bool = False) -> "PackedVectors":
        """Pack (..., D) of any float dtype. In 8 and 4 bits every number comes back to half a step, and a step is the
        vector's range by 255 or by 15; in 2 bits, steps are those that `_fitted` finds. What float16 does not reach is
        cut off.

        Raises:
            ModelError: numbers are to share a byte, and D is no multiple of how many.
        """
        if vectors.shape[-1] * bits % 8:
            problem = f"heads have {vectors.shape[-1]} numbers, {bits} bits need a multiple of {8 // bits}"
            raise ModelError(f"this model's {problem}")
        vectors = vectors.float()
        if bits == 2:
            at_once = _AT_ONCE if vectors.device.type == "cpu" else _AT_ONCE_ELSEWHERE
            pieces = vectors.reshape(-1, vectors.shape[-1]).split(at_once)
            fitted = zip(*(_fitted(piece, are_keys=are_keys) for piece in pieces), strict=True)
            codes, low, step = (torch.cat(own).view(*vectors.shape[:-1], own[0].shape[-1]) for own in fitted)
        else:
            codes, low, step = _ranged(vectors, 2**bits - 1)
        joined, *others = codes.chunk(8 // bits, dim=-1)
        for place, plane in enumerate(others, 1):
            joined = torch.add(joined, plane, alpha=2 ** (bits * place))
        return cls(joined.to(torch.uint8), torch.cat([low, step], dim=-1), bits)

    @classmethod
    def cat(cls, parts: "list[PackedVectors]") -> "PackedVectors":
        """Several (B, n, D) one after the other."""
        codes, ranges = (
            torch.cat(tensors, dim=1) for tensors in zip(*((p.codes, p.ranges) for p in parts), strict=True)
        )
        return cls(codes, ranges, parts[0].bits)

    def unpacked(self) -> Tensor:
        """(..., D) float32."""
        low, step = self.ranges.float().unbind(dim=-1)
        planes = self._planes()
        codes = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
        return codes.float().mul_(step[..., None]).add_(low[..., None])  # faster than addcmul

    def planes(self) -> list[Tensor]:
        """Codes as float32, (..., D * bits / 8) each: of the first numbers, of the next, ..."""
        return [plane.float() for plane in self._planes()]

    def _planes(self) -> list[Tensor]:
        if self.bits == 8:
            return [self.codes]
        mask, last = 2**self.bits - 1, 8 - self.bits
        between = [self.codes >> shift & mask for shift in range(self.bits, last, self.bits)]
        return [self.codes & mask, *between, self.codes >> last]  # the outer ones take one operation

    def by_head(self, num_heads: int) -> "PackedVectors":
        """(B, heads, n, D) of (B, heads * n, D)."""
        codes, ranges = (tensor.unflatten(1, (num_heads, -1)) for tensor in (self.codes, self.ranges))
        return PackedVectors(codes, ranges, self.bits)

    def split(self, counts: list[int]) -> "list[PackedVectors]":
        """(B, n, D) of each count, views."""
        pairs = zip(self.codes.split(counts, dim=1), self.ranges.split(counts, dim=1), strict=True)
        return [PackedVectors(codes, ranges, self.bits) for codes, ranges in pairs]

    def sliced(self, stop: int) -> "PackedVectors":
        """The first vectors of (B, n, D), a view."""
        return PackedVectors(self.codes[:, :stop], self.ranges[:, :stop], self.bits)

    def gathered(self, indices: Tensor) -> "PackedVectors":
        """The named vectors of (B, n, D); `indices` is (B, R)."""
        rows = torch.arange(len(indices), device=indices.device)[:, None]
        return PackedVectors(self.codes[rows, indices], self.ranges[rows, indices], self.bits)


def is_turned(bits: int) -> bool:
    """Whether vectors in so many bits are turned by `rotation`, and centred, before they are packed."""
    return bits < 8


def _ranged(vectors: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., D) float32, and (..., 1) float16 each: the lowest number, which is code 0, and the step."""
    low = vectors.amin(dim=-1, keepdim=True).clamp(-_LARGEST, _LARGEST).half()  # aminmax takes ten times that
    high = vectors.amax(dim=-1, keepdim=True).clamp(-_LARGEST, _LARGEST)
    step = ((high - low.float()) / levels).clamp(min=0, max=_LARGEST).half()
    return _codes(vectors, low.float(), step.float(), levels), low, step


def _fitted(vectors: Tensor, *, are_keys: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of four levels that need not reach what is farthest out: least squares, from the best for normally
    distributed numbers on.

    Keys are lengthened until their product with what they were is what that was with itself: as they are they would be
    too short, and all logits of attention too small.
    """
    vectors = vectors.clamp(-_LARGEST, _LARGEST)
    mean = vectors.mean(dim=-1, keepdim=True)
    apart = vectors - mean
    step = _GAUSSIAN_STEP * apart.square().mean(dim=-1, keepdim=True).sqrt()
    low = mean - 1.5 * step
    for _ in range(2):
        codes = _codes(vectors, low, step, 3)
        middle = codes.mean(dim=-1, keepdim=True)
        step = _quotient(_product(codes - middle, apart), _product(codes - middle, codes - middle))
        low = mean - step * middle
    if are_keys:
        longer = _quotient(_product(vectors, vectors), _product(vectors, low + step * codes)).clamp(max=_LONGEST)
        low, step = low * longer, step * longer
    low, step = (one.clamp(-_LARGEST, _LARGEST).half() for one in (low, step))
    return codes, low, step


def _codes(vectors: Tensor, low: Tensor, step: Tensor, levels: int) -> Tensor:
    return (vectors - low).div_(step.clamp(min=_SMALLEST_STEP)).round_().clamp_(0, levels)


def _product(some: Tensor, others: Tensor) -> Tensor:
    return (some * others).sum(dim=-1, keepdim=True)


def _quotient(number: Tensor, by: Tensor) -> Tensor:
    """0 where `by` is."""
    return number / by.masked_fill(by == 0, torch.inf)


@functools.lru_cache
def rotation(dim: int, device: torch.device) -> Tensor:
    """(D, D) float32, orthogonal: spreads one channel evenly over many, so that a range is not that of one outlier.

    Hadamard matrices of the largest power of two that divides D, with random but always equal signs.
    Source: QuaRot (arXiv 2404.00456), section 3.
    """
    size = dim & -dim
    block = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], dim=1), torch.cat([block, -block], dim=1)])
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    with torch.inference_mode(False):  # it outlives any
        turns: Tensor = torch.block_diag(*[block * signs / size**0.5] * (dim // size)).to(device)
    return turns
