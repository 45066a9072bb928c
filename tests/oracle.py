"""An independent reference: the plain model, without any cache, in which evicted prompt tokens are masked out.

Nothing here uses the package's attention, cache or mask code. A forward pass reads the whole sequence; queries behind
the prompt cannot see what was evicted from their layer and KV head, queries of the prompt see everything before them.
The same holds for what was evicted later, from all that was read until then.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

import tiny
from compresskv import CompressedCache
from compresskv.models.shape import decoder_config

Evictions = dict[int, Tensor]
"""layer of the model -> (B, 1 or H_kv, T) bool: which of the first T tokens were evicted from it once T were read."""

_evictions: list[Evictions] = []


def evictions(cache: CompressedCache) -> Evictions:
    """What `cache` says it evicted."""
    evicted = {}
    for layer in cache.compressed_layers:
        if layer.positions is not None:
            num_rows, num_heads, _ = layer.positions.shape
            num_tokens = layer.seen_tokens if layer.store is None else layer.store.held.floor
            # One column more, for the index -1 of unused slots.
            kept = torch.zeros(num_rows, num_heads, num_tokens + 1, dtype=torch.bool)
            evicted[layer.layer_idx] = ~kept.scatter_(-1, layer.positions % kept.shape[-1], True)[..., :-1]
    return evicted


@functools.cache
def oracle_model(family: str) -> PreTrainedModel:
    """The same weights as `tiny.tiny_model`, with the attention below."""
    model = tiny.build_model(family, "eager")
    model.config._attn_implementation = "oracle"
    return model


@contextmanager
def evicted(*evictions: Evictions) -> Iterator[None]:
    """Mask out `evictions` in every oracle model, those that came later behind the others."""
    _evictions.extend(evictions)
    try:
        yield
    finally:
        _evictions.clear()


def oracle_logits(
    family: str, sequence: Tensor, evictions: Evictions, attention_mask: Tensor | None = None, *later: Evictions
) -> Tensor:
    """(B, T_all, vocab) of one forward pass over prompt and continuation."""
    mask = torch.ones_like(sequence) if attention_mask is None else attention_mask
    with evicted(evictions, *later), torch.no_grad():
        output = oracle_model(family)(
            input_ids=sequence, attention_mask=mask, position_ids=tiny.position_ids(mask), use_cache=False
        )
    return output.logits


def _oracle_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    num_query_heads, num_kv_heads = query.shape[1], key.shape[1]
    key, value = (states.repeat_interleave(num_query_heads // num_kv_heads, dim=1) for states in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits + attention_mask
    logits = logits + _hidden(module, query, key.shape[2])
    if s_aux is not None:  # a learned logit of each head beside those of its keys
        logits = torch.cat([logits, s_aux[None, :, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    return (logits.softmax(dim=-1)[..., : key.shape[2]] @ value).transpose(1, 2), None


def _hidden(module: nn.Module, query: Tensor, num_keys: int) -> Tensor:
    """(B, H_q, T, keys): minus infinity where a later query meets what was evicted, else zero."""
    batch_size, num_query_heads, num_new, _ = query.shape
    hidden = query.new_zeros(batch_size, num_query_heads, num_new, num_keys)
    layer_idx = getattr(module, "layer_idx", None)
    for gone in (one[layer_idx] for one in _evictions if layer_idx in one):
        num_seen = gone.shape[-1]
        # Beams and returned sequences repeat the rows of the batch.
        blocked = gone.repeat_interleave(batch_size // len(gone), dim=0)
        blocked = blocked.repeat_interleave(num_query_heads // blocked.shape[1], dim=1)
        hidden[:, :, num_seen:, :num_seen].masked_fill_(blocked[:, :, None], -torch.inf)
    return hidden


@contextmanager
def masking(model: PreTrainedModel, evictions: Evictions) -> Iterator[None]:
    """Let `model` itself be the reference, by its own eager attention, for passes without a cache."""
    config = decoder_config(model)
    own, config._attn_implementation = config._attn_implementation, "oracle_eager"
    try:
        with evicted(_with_readers(config, evictions)):
            yield
    finally:
        config._attn_implementation = own


def _with_readers(config: Any, evictions: Evictions) -> Evictions:
    """Layers without keys of their own read those of the last layer of their kind that has some, and miss the same."""
    num_own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    extended = dict(evictions)
    for layer in range(num_own, config.num_hidden_layers):
        own = [source for source in range(num_own) if config.layer_types[source] == config.layer_types[layer]]
        if own[-1] in evictions:
            extended[layer] = evictions[own[-1]]
    return extended


def _masked_eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention that a model's module defines beside itself, with its sinks and whatever else it has."""
    sources = [sys.modules[kind.__module__] for kind in type(module).__mro__]
    eager = next(source.eager_attention_forward for source in sources if hasattr(source, "eager_attention_forward"))
    hidden = _hidden(module, query, key.shape[2])
    attention_mask = hidden if attention_mask is None else attention_mask + hidden
    return eager(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register("oracle_eager", _masked_eager_attention)
AttentionMaskInterface.register("oracle_eager", eager_mask)
AttentionInterface.register("oracle", _oracle_attention)
AttentionMaskInterface.register("oracle", eager_mask)
