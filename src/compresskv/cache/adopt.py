"""Layers that take over what a full cache holds."""

import copy
from typing import Any

from transformers.cache_utils import Cache

from compresskv.cache.layer import CompressedLayer
from compresskv.cache.routed import trim_sliding_window
from compresskv.cache.window import QueryWindow
from compresskv.errors import CacheStateError


def check_adoptable(full: Cache, num_prompt: int, empty: Cache) -> None:
    """Refuse a full cache that does not hold one whole prompt, or what is not an empty cache for the same model.

    Raises:
        CacheStateError: saying what they hold.
    """
    num_tokens, layers = full.get_seq_length(), empty.layers
    held = [
        getattr(source, "keys", None)
        for source, layer in zip(full.layers, layers, strict=False)
        if isinstance(layer, CompressedLayer)
    ]
    whole = all(keys is not None and keys.shape[0] == 1 and keys.shape[2] >= num_tokens for keys in held)
    fits = len(full.layers) == len(layers) and whole
    if empty.get_seq_length() or not 0 < num_prompt <= num_tokens or not fits:
        raise CacheStateError(
            f"cannot adopt {num_prompt} prompt tokens from a {type(full).__name__} of {num_tokens} tokens in "
            f"{len(full.layers)} layers into a cache of {empty.get_seq_length()} in {len(layers)}"
        )


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
