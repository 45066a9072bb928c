"""Many whole numbers in few bytes: positions and token ids beside keys and values."""

import math
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Shapes = list[list[int]]


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
    """Integer or bool tensors as one of bytes, and their shapes: differences, the bytes of equal rank side by side."""
    flat = [tensor.detach().cpu().reshape(-1).to(torch.int64).numpy() for tensor in tensors]
    values = np.concatenate([np.zeros(0, dtype=np.int64), *flat])
    steps = np.diff(values, prepend=np.int64(0)).astype("<i8")
    planes = np.ascontiguousarray(steps.view(np.uint8).reshape(-1, 8).T)
    packed = np.frombuffer(zlib.compress(planes.tobytes(), 6), dtype=np.uint8).copy()
    return torch.from_numpy(packed), [list(tensor.shape) for tensor in tensors]


def unpack(packed: Tensor, shapes: Shapes) -> list[Tensor]:
    """The int64 tensors that `pack` was given.

    Raises:
        ValueError: it holds other numbers of them.
    """
    counts = [math.prod(shape) for shape in shapes]
    expected = 8 * sum(counts)
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(packed.numpy().tobytes(), min(expected + 1, sys.maxsize))
    except zlib.error as error:
        raise ValueError(f"its numbers cannot be unpacked: {error}") from error
    if len(data) != expected or not unpacking.eof:
        raise ValueError(f"it holds {len(data)} bytes of numbers, and should hold {expected}")
    planes = np.frombuffer(data, dtype=np.uint8).reshape(8, -1)
    values = torch.from_numpy(np.cumsum(np.ascontiguousarray(planes.T).view("<i8").reshape(-1)).astype(np.int64))
    return [own.reshape(shape) for own, shape in zip(values.split(counts), shapes, strict=True)]
