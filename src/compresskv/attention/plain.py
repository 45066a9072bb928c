"""Attention that differs from the usual one by nothing but the factor on its dot products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class PlainAttention:
    """An attention function that nothing but `scaling`, the factor on dot products, makes different from the usual one.

    Who holds keys in a form of his own may then compute it himself.
    """

    def __init__(self, function: AttentionFunction, scaling: float) -> None:
        self._function, self.scaling = function, scaling

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As the function."""
        return self._function(query, key, value, mask)


def scaling_of(query: Tensor, scaling: float | None) -> float:
    """The factor on dot products that a module gave to its attention function, or the usual D ** -0.5."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def is_plain(
    module: nn.Module,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> bool:
    """Whether nothing but the scaling changes the usual attention."""
    return not (softcap or dropout or output_attentions or position_bias is not None or has_sinks(module))


def has_sinks(module: nn.Module) -> bool:
    """Whether the heads have learned attention sinks, which take a share of every query's attention."""
    return getattr(module, "sinks", None) is not None


def grouped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of one new token to all that is held: the queries that read a KV head are its rows, so that keys are
    read once and never repeated.

    Args:
        query: (B, H_kv * G, 1, D).
        keys, values: (B, H_kv, n, D).
        mask: (B, H_kv * G or 1, 1, n), bool or additive; None: all of n.
        scaling: factor on the dot products; None: D ** -0.5.
    Returns: (B, 1, H_kv * G, D).
    """
    batch_size, num_query_heads, _, head_dim = query.shape
    grouped = query.reshape(batch_size, keys.shape[1], -1, head_dim)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], *grouped.shape[1:3], mask.shape[-1])
    output = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return output.reshape(batch_size, 1, num_query_heads, values.shape[-1])
