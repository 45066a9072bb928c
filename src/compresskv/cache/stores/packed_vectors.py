"""Vectors in 8 or 4 bits a number, each with a range of its own."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskv.errors import ModelError

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST_STEP = 2.0**-24
"""Of float16: below, all of a vector's numbers are taken to be equal."""


@dataclass(frozen=True)
class PackedVectors:
    """Numbers as codes: a number is its vector's lowest one, and its code times the vector's step."""

    codes: Tensor
    """(..., D * bits / 8) uint8. In 4 bits, byte i holds number i in its lower half and number i + D / 2 above."""
    ranges: Tensor
    """(..., 2) float16: each vector's lowest number, and its step."""
    bits: int

    @classmethod
    def of(cls, vectors: Tensor, bits: int) -> "PackedVectors":
        """Pack (..., D) of any float dtype: every number comes back to half a step, and a step is the vector's range by
        255 or by 15. What float16 does not reach is cut off.

        Raises:
            ModelError: two numbers are to share a byte, and D is odd.
        """
        if bits == 4 and vectors.shape[-1] % 2:
            raise ModelError(
                f"this model's heads have {vectors.shape[-1]} numbers, an odd count: 4 bits need an even one"
            )
        levels = 2**bits - 1
        vectors = vectors.float()
        low = vectors.amin(dim=-1, keepdim=True).clamp(-_LARGEST, _LARGEST).half()  # aminmax takes ten times that
        high = vectors.amax(dim=-1, keepdim=True).clamp(-_LARGEST, _LARGEST)
        step = ((high - low.float()) / levels).clamp(min=0, max=_LARGEST).half()
        codes = (vectors - low.float()).div_(step.float().clamp(min=_SMALLEST_STEP)).round_().clamp_(0, levels)
        if bits == 4:
            lower, upper = codes.chunk(2, dim=-1)
            codes = torch.add(lower, upper, alpha=16)
        codes = codes.to(torch.uint8)
        return cls(codes, torch.cat([low, step], dim=-1), bits)

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
        codes = torch.cat([self.codes & 15, self.codes >> 4], dim=-1) if self.bits == 4 else self.codes
        return codes.float().mul_(step[..., None]).add_(low[..., None])  # faster than addcmul

    def planes(self) -> list[Tensor]:
        """Codes as float32, (..., D), or in 4 bits (..., D / 2) twice: of the first numbers, and of the others."""
        return [self.codes.float()] if self.bits == 8 else [(self.codes & 15).float(), (self.codes >> 4).float()]

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


@functools.lru_cache
def rotation(dim: int, device: torch.device) -> Tensor:
    """(D, D) float32, orthogonal: spreads one channel evenly over many, so that a range is not that of one outlier.

    Hadamard matrices of the largest power of two that divides D, with random but always equal signs.
    Source: QuaRot (arXiv 2404.00456), section 3.
    """
    size = dim & -dim
    block = torch.ones(1, 1, device="cpu")
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], dim=1), torch.cat([block, -block], dim=1)])
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    with torch.inference_mode(False):  # it outlives any
        turns: Tensor = torch.block_diag(*[block * signs / size**0.5] * (dim // size)).to(device)
    return turns
