"""What a tensor repeats of another one, row by row, so that a file holds it once.

A conversation goes on from its document: most of its keys and values are the document's, with new tokens behind each KV
head's. Rows are told by their bytes, so this holds for every store and for layers of other kinds.
"""

import math

import numpy as np
import torch
from torch import Tensor

NEW = -1
"""In place of a row's number: it is repeated from nowhere."""
_LEAST_NBYTES = 4
_SEED = 20_871_123


def part(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which rows (..., D) of `own` are rows of `other`, and what is new; None where they have no rows alike in kind.

    Returns: for each row of `own` the number of one of `other`'s, or `NEW`, (n,) int64; and the new rows (m, D).
    """
    alike = own.dtype == other.dtype and own.dim() > 1 < other.dim() and own.shape[-1] == other.shape[-1]
    if not alike or not own.numel() or not other.numel() or own.shape[-1] * own.element_size() < _LEAST_NBYTES:
        return None
    mine, others = _bytes(own), _bytes(other)
    known, wanted = _hashes(others), _hashes(mine)
    order = np.argsort(known, kind="stable")
    places = np.searchsorted(known[order], wanted).clip(max=len(known) - 1)
    found = order[places]
    same = (mine == others[found]).all(axis=1)
    sources = torch.from_numpy(np.where(same, found, NEW).astype(np.int64))
    return sources, own.reshape(-1, own.shape[-1])[sources == NEW]


def join(sources: Tensor, new: Tensor, other: Tensor, shape: list[int]) -> Tensor:
    """The tensor that `part` was given as `own`.

    Raises:
        ValueError: they do not fit together.
    """
    rows, is_new = other.reshape(-1, other.shape[-1]), sources == NEW
    fits = len(new) == int(is_new.sum()) and bool(((sources >= NEW) & (sources < len(rows))).all())
    if not fits or math.prod(shape) != sources.numel() * other.shape[-1]:
        raise ValueError("what a conversation repeats of its document is not there")
    joined = rows[sources.clamp(min=0)]
    joined[is_new] = new
    return joined.reshape(shape)


def _bytes(tensor: Tensor) -> np.ndarray:
    """(rows, bytes of each) uint8."""
    return tensor.contiguous().reshape(-1, tensor.shape[-1]).view(torch.uint8).numpy()


def _hashes(rows: np.ndarray) -> np.ndarray:
    """(rows,) uint64, alike for rows that are alike, and nearly always for these alone."""
    words = np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))).view(np.uint64)
    factors = np.random.default_rng(_SEED).integers(0, 2**63, words.shape[1], dtype=np.uint64) * 2 + 1
    mixed = (words ^ (words >> np.uint64(29))) * factors
    hashes: np.ndarray = (mixed ^ (mixed >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
    return hashes
