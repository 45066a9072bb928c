"""A document becomes a compressed cache: in one pass, or in chunks."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.models.decoding import prefill
from compresskv.models.place import input_device
from compresskv.plans.capture import read_twice
from compresskv.selection.budgets import Budget
from compresskv.selection.precision import NATIVE

OnRead = Callable[[int, int], None]
"""Called with (steps done, steps); a step is one layer's reading of one chunk."""


def read_document(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    method: Method,
    budget: Budget,
    *,
    store: str = NATIVE,
    chunk: int | None = None,
    on_read: OnRead | None = None,
) -> CompressedCache:
    """Read a document and cut it.

    Args:
        store: as for `compressing`.
        chunk: tokens to read at a time; None: all at once. What is kept is the same up to rounding: nothing is evicted
            before all was read.
    Raises:
        ConfigError: the method looks ahead, or the budget or the chunk cannot work.
    """
    if method.lookahead:
        raise ConfigError(f"lookahead={method.lookahead}: a document is cut before anything is asked")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ConfigError("must be an int of at least 1", option="chunk", value=chunk)
    step = len(token_ids) if chunk is None else chunk
    chunks = [token_ids[start : start + step] for start in range(0, len(token_ids), step)]
    done = _Steps(len(chunks), on_read)
    with routing(model):
        cache = CompressedCache(model, method, budget, prompt_tokens=len(token_ids), on_layer=done, store=store)
        if method.replays:
            read_twice(model, chunks, cache)
        else:
            for part in chunks:
                prefill(model, torch.tensor([list(part)], device=input_device(model)), cache)
        cache.check_attended()
    return cache


class _Steps:
    """Counts the layers of all chunks."""

    def __init__(self, num_chunks: int, on_read: OnRead | None) -> None:
        self._num_chunks = num_chunks
        self._on_read = on_read
        self._done = 0

    def __call__(self, _: int, layers: int) -> None:
        self._done += 1
        if self._on_read is not None:
            self._on_read(self._done, layers * self._num_chunks)
