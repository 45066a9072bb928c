"""The observation window's attention where keys come in pieces: what one matrix of logits would take is never held."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from compresskv.selection.scores import moments_over_window, window_products, without_window
from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor


def attention_in_pieces(
    query_window: Tensor,
    pieces: Callable[[], Iterable[Tensor]],
    num_tokens: int,
    head_indices: list[int] | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Iterator[Tensor]:
    """`window_attention`, piece by piece: keys are read once for what rows sum to, and once more for attention.

    Args:
        query_window: (B, H_q, W, D), post-RoPE, the last W of the tokens.
        pieces: gives the keys of all tokens, (B, H_kv, n, D) each, from the first on; called twice.
        num_tokens: T, of all pieces.
        head_indices: the query heads that are wanted; None: all.
    Returns: for each piece (B, H, W, n) float32; rows sum to 1 over all pieces.
    """
    window_size = query_window.shape[2]

    def logits() -> Iterator[Tensor]:
        start = 0
        for keys in pieces():
            end = start + keys.shape[2]
            found = window_products(query_window, keys, head_indices).mul_(scaling)
            if softcap is not None:
                found.div_(softcap).tanh_().mul_(softcap)
            if end > num_tokens - window_size:
                own = torch.arange(num_tokens - window_size, num_tokens, device=keys.device)
                future = torch.arange(start, end, device=keys.device) > own[:, None]
                found.masked_fill_(future, torch.finfo(torch.float32).min)
            yield found
            start = end

    total = functools.reduce(torch.logaddexp, (found.logsumexp(dim=-1, keepdim=True) for found in logits()))
    for found in logits():
        yield found.sub_(total).exp_()


def moments_in_pieces(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """`window_moments` of attention that comes in pieces, see `attention_in_pieces`: two of (B, H, T) float32."""
    means, variances, window_size = [], [], 0
    for attention in pieces:
        window_size = attention.shape[2]
        mean, variance = moments_over_window(attention)
        means.append(mean)
        variances.append(variance)
    mean, variance = torch.cat(means, dim=-1), torch.cat(variances, dim=-1)
    return without_window(mean, window_size), without_window(variance, window_size)


def sums_in_pieces(pieces: Iterable[Tensor]) -> Tensor:
    """`sum_over_window` of attention that comes in pieces: (B, H, T) float32."""
    sums, window_size = [], 0
    for attention in pieces:
        sums.append(attention.sum(dim=2))
        window_size = attention.shape[2]
    return without_window(torch.cat(sums, dim=-1), window_size)
