"""Pure tensor functions that turn window attention into token scores. No transformers types, no model state."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from compresskv.system.later import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor


@no_grad
def window_attention(
    query_window: Tensor,
    keys: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention from the observation window to every key.

    Each KV head is multiplied once with all the queries that read it, so keys are never repeated per query head.
    Causality is the prompt's own (the window is its end); padding comes from `valid`.

    Args:
        query_window: (B, H_kv * G, W, D), post-RoPE, the last W prompt tokens; heads that read one KV head adjoin.
        keys: (B, H_kv, T, D), post-RoPE, T >= W.
        scaling: factor on the dot products, usually D ** -0.5.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        valid: (B, T) bool, False at padding; None where nothing is padded.
        sinks: (H_kv * G,), learned logits that take a share of each row, as in gpt-oss; None where there are none.
    Returns: (B, H_kv * G, W, T) float32; rows sum to 1, or less with sinks; causal inside the window.
    Raises:
        ValueError: T < W, or the query heads are no multiple of the KV heads.
    Source: SnapKV (arXiv 2404.14469), section 4. Differs: softmax in float32 whatever the model's dtype.
    """
    logits = window_products(query_window, keys)
    return _attention_(logits, scaling=scaling, softcap=softcap, valid=valid, sinks=sinks)


@no_grad
def window_products(query_window: Tensor, keys: Tensor, head_indices: list[int] | None = None) -> Tensor:
    """Dot products of the window's queries with keys.

    Args:
        query_window: (B, H_q, W, D).
        keys: (B, H_kv, T, D).
        head_indices: the query heads that are wanted, each once; None: all.
    Returns: (B, H, W, T) float32, in the order of `head_indices`.
    Raises:
        ValueError: the query heads are no multiple of the KV heads, or there is no such query head.
    """
    batch_size, num_query_heads, window_size, head_dim = query_window.shape
    num_kv_heads = keys.shape[1]
    num_kv_groups = _num_kv_groups(num_query_heads, num_kv_heads)
    if head_indices is None:
        # (B, H_kv, G * W, D) @ (B, H_kv, D, T): one product per KV head
        grouped = query_window.reshape(batch_size, num_kv_heads, -1, head_dim)
        products = _products_by_head if keys.device.type == "cpu" else _products_at_once
        logits = products(grouped, keys, list(range(num_kv_heads)))
        return logits.view(batch_size, num_query_heads, window_size, -1)
    for head in head_indices:
        if not 0 <= head < num_query_heads:
            raise ValueError(f"there is no query head {head} among {num_query_heads}")
    queries = torch.stack([query_window[:, head] for head in head_indices], dim=1)  # an index would make a GPU wait
    return _products_by_head(queries, keys, [head // num_kv_groups for head in head_indices])


def _products_at_once(queries: Tensor, keys: Tensor, _kv_heads: list[int]) -> Tensor:
    """Of (B, H_kv, R, D) queries with all KV heads' keys: (B, H_kv, R, T) float32."""
    return torch.matmul(queries, keys.transpose(2, 3)).float()


def _products_by_head(queries: Tensor, keys: Tensor, kv_heads: list[int]) -> Tensor:
    """Of (B, n, R, D) queries each n with the keys of a KV head: (B, n, R, T) float32.

    On a CPU a batched product takes several times as long for keys that lie token by token, as projections leave them.
    """
    batch_size, _, num_rows, _ = queries.shape
    logits = keys.new_empty(batch_size, len(kv_heads), num_rows, keys.shape[2], dtype=torch.float32)
    for row in range(batch_size):
        for place, kv_head in enumerate(kv_heads):
            logits[row, place] = torch.mm(queries[row, place], keys[row, kv_head].t())
    return logits


def _attention_(
    logits: Tensor, *, scaling: float, softcap: float | None, valid: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Dot products (B, H, W, T) become attention, in place.

    Raises:
        ValueError: T < W.
    """
    window_size, num_tokens = logits.shape[2:]
    if num_tokens < window_size:
        raise ValueError(f"{num_tokens} keys are fewer than the window's {window_size} queries")
    logits.mul_(scaling)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    # A finite minimum, not -inf: the row of a padding query has no visible key and must not become NaN.
    lowest = torch.finfo(torch.float32).min
    logits[..., -window_size:].masked_fill_(_future(window_size, logits.device), lowest)
    if valid is not None:
        logits.masked_fill_(~valid[:, None, None, :], lowest)
    if sinks is None:
        return _softmax_(logits)
    share = torch.sigmoid(logits.logsumexp(dim=-1, keepdim=True) - sinks.float()[:, None, None])
    return _softmax_(logits).mul_(share)


@functools.lru_cache(maxsize=8)
def _future(window_size: int, device: torch.device) -> Tensor:
    """(W, W) bool: the window's tokens that each of its queries cannot see. One for all layers."""
    return torch.ones(window_size, window_size, dtype=torch.bool, device=device).triu_(1)


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in place: fresh memory for so much costs more than the arithmetic."""
    if logits.device.type == "cpu":  # its kernel reads each row in full before it writes there; a test holds it to that
        return torch.softmax(logits, dim=-1, out=logits)
    return _plain_softmax_(logits)


def _plain_softmax_(logits: Tensor) -> Tensor:
    logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=-1, keepdim=True))


@no_grad
def heads_window_attention(
    query_window: Tensor,
    keys: Tensor,
    head_indices: list[int],
    *,
    scaling: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Like `window_attention`, for some query heads only: nothing is computed or stored for the others.

    Args:
        query_window: (B, H_q, W, D); query head h reads KV head h // (H_q / H_kv).
        keys: (B, H_kv, T, D).
        head_indices: n query heads, each once.
    Returns: (B, n, W, T) float32, in the order of `head_indices`.
    Raises:
        ValueError: as for `window_attention`, or there is no such query head.
    """
    logits = window_products(query_window, keys, head_indices)
    own = None if sinks is None else torch.stack([sinks[head] for head in head_indices])
    return _attention_(logits, scaling=scaling, softcap=softcap, valid=valid, sinks=own)


def sum_over_window(attention: Tensor) -> Tensor:
    """The attention that each token gets from the whole window.

    The window's own tokens get 0: they are kept anyway, and must not lift their neighbours through pooling.

    Args:
        attention: (B, H, W, T).
    Returns: (B, H, T).
    """
    return without_window(attention.sum(dim=2), attention.shape[2])


def without_window(scores: Tensor, window_size: int) -> Tensor:
    """Set the scores (B, H, T) of the last `window_size` tokens to 0, in place."""
    scores[..., scores.shape[-1] - window_size :] = 0
    return scores


def without_padding(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Set the scores (B, H, T) of padding to 0, in place: pooling carries some into it."""
    return scores if valid is None else scores.masked_fill_(~valid[:, None], 0)


def set_first(scores: Tensor, count: int, value: float, valid: Tensor | None) -> Tensor:
    """Set the scores (B, H, T) of each row's first `count` tokens, in place; infinity keeps them.

    Args:
        valid: (B, T) bool, False at padding; None where nothing is padded.
    """
    if valid is None:
        scores[..., :count] = value
    else:
        first = valid & (valid.cumsum(-1) <= count)
        scores.masked_fill_(first[:, None], value)
    return scores


def window_moments(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of `window_attention`, which is overwritten; 0 for the window's own tokens.

    Returns: two of (B, H_q, T) float32.
    """
    window_size = attention.shape[2]
    mean, variance = moments_over_window(attention)
    return without_window(mean, window_size), without_window(variance, window_size)


def moments_over_window(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the W queries of (B, H, W, n) attention, which is overwritten: two of (B, H, n)."""
    mean = attention.mean(dim=2)
    return mean, attention.sub_(mean[:, :, None]).square_().mean(dim=2)


def mean_over_groups(scores: Tensor, num_kv_heads: int) -> Tensor:
    """(B, H_q, T) to (B, H_kv, T): the mean over the query heads that read each KV head."""
    mean: Tensor = scores.unflatten(1, (num_kv_heads, -1)).mean(dim=2)
    return mean


def largest_of_group(scores: Tensor, num_kv_heads: int, valid: Tensor | None = None) -> Tensor:
    """(B, H_q, T) to (B, H_kv, T): the largest over the query heads that read each KV head, no less than the mean of
    that over the head's tokens: what is below it is not known to be worth less.

    Args:
        valid: (B, T) bool, False at padding, which counts in no mean; None where nothing is padded.
    Source: DefensiveKV (arXiv 2510.13334), its defensive aggregation, of which the largest over queries is a part, too.
    """
    largest: Tensor = scores.unflatten(1, (num_kv_heads, -1)).amax(dim=2)
    if valid is None:
        return largest.clamp(min=largest.mean(dim=-1, keepdim=True))
    counts = valid.sum(dim=-1).clamp(min=1)[:, None, None]
    return largest.clamp(min=(largest * valid[:, None]).sum(dim=-1, keepdim=True) / counts)


def pool(scores: Tensor, kernel_size: int) -> Tensor:
    """Average along tokens with stride 1 and unchanged length; beyond both ends counts as 0.

    Args:
        scores: (B, H, T).
        kernel_size: odd number of tokens; 1 leaves the scores as they are.
    Returns: (B, H, T).
    Source: SnapKV, section 4.2 (there: max or average by configuration; the published code averages).
    """
    if kernel_size == 1:
        return scores
    return torch.nn.functional.avg_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)


def _num_kv_groups(num_query_heads: int, num_kv_heads: int) -> int:
    if num_query_heads % num_kv_heads:
        raise ValueError(f"{num_query_heads} query heads are no multiple of {num_kv_heads} KV heads")
    return num_query_heads // num_kv_heads


def summing_to_one(scores: Tensor) -> Tensor:
    """(B, H, T) non-negative, each head's divided by their sum."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
