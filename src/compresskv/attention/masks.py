"""The masks that routed models build."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from compresskv.attention.kernels import kernel_mask, transformers_mask
from compresskv.attention.support import BASES
from compresskv.errors import CacheStateError

_masks = threading.local()  # .unwanted, .length: of the mask that is built next


@contextmanager
def without_masks() -> Iterator[None]:
    """Let routed models build no attention masks in this thread: cache layers know what is masked."""
    _masks.unwanted = True
    try:
        yield
    finally:
        _masks.unwanted = False


def expect_mask(num_tokens: int) -> None:
    """Let the mask that is built next in this thread, if it is of so many tokens, be checked against what is given."""
    _masks.length = num_tokens


def routed_mask(base: str, *args: Any, **kwargs: Any) -> Any:
    """transformers' mask for `base`, unless none is wanted.

    Raises:
        CacheStateError: the given mask is of fewer tokens than the cache has seen.
    """
    expected, _masks.length = getattr(_masks, "length", None), None
    given = kwargs.get("attention_mask")
    if isinstance(given, Tensor) and given.ndim == 2 and expected == kwargs.get("kv_length") != given.shape[1]:
        raise CacheStateError(
            f"the attention mask is of {given.shape[1]} tokens, but with those that the cache has seen there are "
            f"{expected}: reset() the cache before another prompt"
        )
    if getattr(_masks, "unwanted", False):
        return None
    if base in BASES or expected is None:
        return transformers_mask(base, *args, **kwargs)
    return kernel_mask(base, *args, **kwargs)
