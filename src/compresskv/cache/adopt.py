"""Layers that take over what a full cache holds."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache

from compresskv.cache.layer import CompressedLayer
from compresskv.cache.routed import trim_sliding_window
from compresskv.cache.window import QueryWindow


def fits(full: Cache, layers: Sequence[Any]) -> bool:
    """Whether a full cache has as many layers, and where these are compressed, every token of one prompt."""
    held = [
        getattr(source, "keys", None)
        for source, layer in zip(full.layers, layers, strict=False)
        if isinstance(layer, CompressedLayer)
    ]
    whole = all(keys is not None and keys.shape[0] == 1 and keys.shape[2] >= full.get_seq_length() for keys in held)
    return len(full.layers) == len(layers) and whole


def adopted(source: Any, layer: Any, num_prompt: int, num_tokens: int) -> Any:
    """The layer, once it has taken over and cut a full one's prompt; in place of others a copy of the full one.

    Args:
        source: the full cache's layer.
        num_prompt, num_tokens: how many of its tokens are the prompt, and all of them.
    """
    if not isinstance(layer, CompressedLayer):
        copied = copy.deepcopy(source)
        trim_sliding_window(copied)
        return copied
    prompt, later = slice(0, num_prompt), slice(num_prompt, num_tokens)  # a static cache has empty slots behind
    layer.adopt_prompt(source.keys[:, :, prompt], source.values[:, :, prompt])
    layer.observe(QueryWindow(source.keys[:, :, :0]), None)
    if num_tokens > num_prompt:
        layer.adopt_generated(source.keys[:, :, later], source.values[:, :, later])
    return layer
