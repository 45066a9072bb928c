"""Attention of one new token to KV heads that hold different numbers of tokens, as one kernel of Triton's.

Each KV head's part is read in splits, side by side, which are put together in the end (split-K); nothing is masked, and
nothing of other heads' parts is read. Used on CUDA devices alone, and only if the variable COMPRESSKV_TRITON asks for
it: it was never run on one. On CPUs Triton's interpreter tests what it computes, and its compiler that there is code of
it for GPUs.
"""

import os

import torch
from torch import Tensor

_BLOCK, _MOST_SPLITS = 64, 128
_LEAST_ROWS = 16
"""Of a product of Triton's."""
_SHARED_NBYTES = 80 * 1024
"""Of a multiprocessor's shared memory, for what is read ahead; small cards have 99 KiB for everything."""


def reads_by_kernel(query: Tensor) -> bool:
    """Whether this token's queries (B, H_q, 1, D) go through the kernel."""
    dim = query.shape[-1]
    fits = query.is_cuda and query.shape[2] == 1 and dim >= _LEAST_ROWS and dim & (dim - 1) == 0
    return fits and os.environ.get("COMPRESSKV_TRITON", "0") not in ("", "0")


def launch_options(num_groups: int, dim: int, itemsize: int) -> dict[str, int]:
    """The kernel's sizes, and how many blocks of keys and values it reads ahead, for numbers of `itemsize` bytes."""
    ahead = min(2, _SHARED_NBYTES // (2 * _BLOCK * dim * itemsize))
    rows = max(_LEAST_ROWS, 1 << (num_groups - 1).bit_length())
    return {"DIM": dim, "ROWS": rows, "BLOCK": _BLOCK, "num_stages": 1 + ahead}


def ragged_attention(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, ends: Tensor, scaling: float
) -> Tensor:
    """Attention of one token to the parts of all KV heads.

    Args:
        query: (B, H_kv * G, 1, D).
        keys, values: (B, N, D), contiguous, in which each KV head has a part.
        starts, ends: (H_kv,) int64: each part's first and last token.
        scaling: factor on the dot products.
    Returns: (B, 1, H_kv * G, D).
    Source: Flash-Decoding (https://pytorch.org/blog/flash-decoding), here for parts of different lengths.
    """
    batch_size, num_query_heads, _, dim = query.shape
    num_kv_heads, num_slots = len(starts), keys.shape[1]
    num_groups = num_query_heads // num_kv_heads
    shapes = launch_options(num_groups, dim, keys.dtype.itemsize)
    num_rows = shapes["ROWS"]
    num_splits = _num_splits(batch_size * num_kv_heads, num_slots // num_kv_heads, query.device)
    grid = (batch_size, num_kv_heads, num_splits)
    mixed = torch.empty(*grid, num_rows, dim, dtype=torch.float32, device=query.device)
    best, total = (mixed.new_empty(*grid, num_rows) for _ in range(2))
    given = (query.contiguous(), keys, values, starts, ends, mixed, best, total, scaling, num_slots, num_groups)
    from compresskv.compiled.triton_kernels import read_split  # where Triton is installed

    read_split[grid](*given, **shapes)
    shares = (best - best.amax(dim=2, keepdim=True)).exp()  # a split without tokens has none
    output = (mixed * shares[..., None]).sum(dim=2) / (total * shares).sum(dim=2)[..., None]
    return output[:, :, :num_groups].reshape(batch_size, 1, num_query_heads, dim).to(query.dtype)


def _num_splits(num_parts: int, num_tokens: int, device: torch.device) -> int:
    """Into how many splits `num_parts` parts of `num_tokens` each, on average, go, so that no multiprocessor is idle
    where there are blocks of tokens for all.
    """
    wanted = _MOST_SPLITS
    if device.type == "cuda":
        wanted = -(-torch.cuda.get_device_properties(device).multi_processor_count // num_parts)
    return max(1, min(_MOST_SPLITS, wanted, num_tokens // _BLOCK))
