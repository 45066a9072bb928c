"""Causal attention over a prompt: of a later part of it, and in bfloat16 on a CPU by the matrix library's products."""

import functools
import os

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right

_LEAST_TOKENS = 256
_CHUNK_NBYTES = 16 << 20
"""About what one chunk's logits take: little beside a prompt's keys, and near the processor's caches."""
_MASK_NBYTES = 64 << 20
_LEAST_CHUNK, _MOST_CHUNK = 16, 128
_NUM_SHAPES = 32
"""The matrix library prepares, and keeps, a program for every shape it meets: keys are read in so many lengths."""
_MOST_TOKENS = 16_384
"""Beyond that, preparing keys anew for every chunk costs more than is gained."""


def exact_by_default() -> bool:
    """Whether the variable COMPRESSKV_EXACT_PREFILL asks for PyTorch's own attention over prompts: it is set, not 0."""
    return os.environ.get("COMPRESSKV_EXACT_PREFILL", "0") not in ("", "0")


def reads_exactly(device: torch.device, dtype: torch.dtype, exact_prefill: bool | None = None) -> bool:
    """Whether prompts are read by PyTorch's attention alone: that is asked for, or nothing else is meant for these.

    Args:
        exact_prefill: as for `compressing`.
    """
    asked = exact_by_default() if exact_prefill is None else exact_prefill
    return asked or device.type != "cpu" or dtype != torch.bfloat16 or not _has_fast_bfloat16()


def is_faster(query: Tensor, keys: Tensor) -> bool:
    """Whether `causal_attention` is meant for these: many queries, and a processor that multiplies bfloat16."""
    return (
        not reads_exactly(query.device, query.dtype, exact_prefill=False)
        and query.shape[2] >= _LEAST_TOKENS
        and keys.shape[2] <= _MOST_TOKENS
        and not (torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad))
    )


@functools.cache
def _has_fast_bfloat16() -> bool:
    """Whether the processor multiplies matrices of it in instructions of their own, which is when we are faster."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """Attention of each token to itself and all before it, a chunk of queries after another.

    PyTorch's fused kernel takes two to three times as long (docs/speed.md). Differs from it: scaled queries, logits
    and weights are rounded to bfloat16, much as in transformers' 'eager' attention.

    Args:
        query: (B, H_kv * G, T_new, D), of the last tokens.
        keys, values: (B, H_kv, T, D); values may have another D.
        scaling: factor on the dot products; None: D ** -0.5.
    Returns: (B, T_new, H_kv * G, D of the values).
    """
    batch_size, num_query_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_tokens = keys.shape[1:3]
    before = num_tokens - num_queries
    query = query * (head_dim**-0.5 if scaling is None else scaling)
    chunk = _CHUNK_NBYTES // (query.element_size() * batch_size * num_query_heads * num_tokens)
    chunk = max(_LEAST_CHUNK, min(_MOST_CHUNK, chunk))
    key_step = max(chunk, -(-num_tokens // (_NUM_SHAPES * chunk)) * chunk)
    positions = torch.arange(num_tokens, device=query.device)
    output = query.new_empty(batch_size, num_queries, num_query_heads, values.shape[3])
    for start in range(before, num_tokens, chunk):
        end = min(num_tokens, start + chunk)
        num_new, own_rows = end - start, slice(start - before, end - before)
        rows = query[:, :, own_rows].reshape(batch_size, num_kv_heads, -1, head_dim)  # keys are read once a KV head
        read = min(num_tokens, -(-end // key_step) * key_step)
        logits = torch.matmul(rows, keys[:, :, :read].transpose(2, 3))
        future = positions[start:read] > positions[start:end, None]
        own = logits.view(batch_size, num_query_heads, num_new, read)[..., start:]
        own.masked_fill_(future, -torch.inf)
        mixed = torch.matmul(logits.softmax(dim=-1), values[:, :, :read])
        output[:, own_rows] = mixed.view(batch_size, num_query_heads, num_new, -1).transpose(1, 2)
    return output


def later_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """Attention of a prompt's last tokens to themselves and all before them: on a GPU by kernels that need no mask.

    On a CPU, whose kernel needs one, a part of the queries after another: a mask takes four bytes for each pair.

    Args:
        query: (B, H_kv * G, T_new, D), of the last tokens.
        keys, values: (B, H_kv, T, D).
        scaling: factor on the dot products; None: D ** -0.5.
    Returns: (B, T_new, H_kv * G, D).
    """
    num_queries, num_tokens = query.shape[2], keys.shape[2]
    before = num_tokens - num_queries
    step = num_queries if query.is_cuda else max(_LEAST_CHUNK, _MASK_NBYTES // (4 * num_tokens))
    output = query.new_empty(query.shape[0], num_queries, query.shape[1], values.shape[3])
    for start in range(0, num_queries, step):
        end = min(num_queries, start + step)
        seen = before + end
        part = _last_rows(query[:, :, start:end], keys[:, :, :seen], values[:, :, :seen], scaling)
        output[:, start:end] = part.transpose(1, 2)
    return output


def _last_rows(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
    """(B, H_kv * G, T_new, D) of the last tokens.

    A GPU's other kernel that needs no memory for all logits takes as many heads of queries as of keys: G turns of it.
    """
    bias: Tensor = causal_lower_right(query.shape[2], keys.shape[2])
    attend, num_kv_heads = torch.nn.functional.scaled_dot_product_attention, keys.shape[1]
    if query.shape[1] == num_kv_heads or _takes_groups(query, keys, values):
        grouped = query.shape[1] != num_kv_heads
        return attend(query, keys, values, attn_mask=bias, scale=scaling, enable_gqa=grouped)
    turns = query.unflatten(1, (num_kv_heads, -1)).unbind(dim=2)
    parts = [attend(own, keys, values, attn_mask=bias, scale=scaling) for own in turns]
    return torch.stack(parts, dim=2).flatten(1, 2)


def _takes_groups(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether grouped heads are read without memory for all logits: on a GPU, by flash attention alone."""
    given = SDPAParams(query, keys, values, None, 0.0, False, True)
    return not query.is_cuda or can_use_flash_attention(given)


def causal_mask(num_new: int, num_seen: int, device: torch.device) -> Tensor:
    """(1, 1, num_new, num_seen) bool, for new tokens that end what was seen.

    Where transformers leaves causality to the attention function, that would align it to what is stored.
    """
    mask = torch.ones(num_new, num_seen, dtype=torch.bool, device=device)
    return mask.tril_(num_seen - num_new)[None, None]
