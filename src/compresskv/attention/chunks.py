"""Reading a prompt chunk by chunk through the whole model, for caches that are cut in between."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from compresskv.errors import CacheStateError, ModelError, PromptError
from compresskv.models.arguments import with_cache


class ChunkwiseCache(Protocol):
    """A cache that may ask for chunks."""

    reads_in_chunks: bool
    """Whether it does."""

    def chunk_ends(self, num_new: int) -> list[int]:
        """Where each chunk of so many new tokens ends; the last one with them."""

    def reading_chunk(self, num_after: int) -> AbstractContextManager[None]:
        """While the model reads one, before so many tokens more."""

    def num_of_end(self, num_after: int) -> int:
        """How many tokens of the prompt's end it wants to be read now, between chunks, before so many tokens more."""

    def cut_chunk(self, read_end: Callable[["ChunkwiseCache"], object]) -> None:
        """Cut, now that a chunk has been read.

        Args:
            read_end: reads these tokens, as if they came next, into the cache that it is given.
        """


def forward_in_chunks(forward: Callable[..., Any], cache: ChunkwiseCache, ends: list[int], /, **given: Any) -> Any:
    """What a decoder's `forward` would return, called for one chunk after another.

    Args:
        ends: see `ChunkwiseCache`.
        given: to the whole call.
    Raises:
        PromptError: rows are padded.
        ModelError: the decoder is given, or is to return, what cannot be told of a chunk.
    """
    num_tokens, outputs = ends[-1], []
    mask = given.get("attention_mask")
    check_unpadded(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    for start, end in pairwise([0, *ends]):
        with cache.reading_chunk(num_tokens - end):
            outputs.append(forward(**dict(_cut(given, start, end, num_tokens))))
        if num_of_end := cache.num_of_end(num_tokens - end):
            own = dict(_cut(given, end, end + num_of_end, num_tokens, first=num_tokens - num_of_end))
            cache.cut_chunk(functools.partial(_read_into, forward, own))
    last = outputs[-1]
    if any(getattr(last, name, None) is not None for name in ("hidden_states", "attentions")):
        raise ModelError("a prompt that is cut chunk by chunk has no hidden states or attentions to return")
    last.last_hidden_state = torch.cat([output.last_hidden_state for output in outputs], dim=1)
    return last


def _read_into(forward: Callable[..., Any], own: dict[str, Any], cache: ChunkwiseCache) -> None:
    forward(**with_cache(own, cache))


def check_unpadded(valid: Tensor | None) -> None:
    """Refuse rows with padding.

    Args:
        valid: (B, T), False or 0 at padding; None where there is none.
    Raises:
        PromptError: a row has some.
    """
    if valid is not None and not bool(valid.all()):
        raise PromptError("prompts of a padded batch cannot be cut chunk by chunk: leave out chunk_budget=N")


def check_ends(ends: Iterable[int], cut_at: int, num_read: int) -> None:
    """Refuse to go on where what was read is beyond a cut that was not made.

    Args:
        cut_at, num_read: tokens that were read at the last cut, and now.
    Raises:
        CacheStateError: the model does not read in chunks, or was interrupted in front of the cut.
    """
    if any(cut_at < end < num_read for end in ends):
        raise CacheStateError(
            f"{num_read} tokens were read, beyond a cut that was not made: this model cannot read prompts in chunks, "
            "or a forward pass was interrupted: reset() the cache and read the prompt again"
        )


def _cut(
    given: dict[str, Any], start: int, end: int, num_tokens: int, first: int | None = None
) -> Iterator[tuple[str, Any]]:
    """The arguments that go with tokens `start` to `end`, or in their places as many from `first` on."""
    for name, value in given.items():
        is_tensor = isinstance(value, Tensor) and value.ndim > 0
        dim = -1 if name in ("position_ids", "cache_position") else 1
        if name == "attention_mask" and is_tensor and value.ndim == 2:
            yield name, value[:, : value.shape[1] - (num_tokens - end)]
        elif is_tensor and name != "attention_mask" and value.ndim > dim and value.shape[dim] == num_tokens:
            begin = start if first is None or dim == -1 else first
            yield name, value.narrow(dim, begin, end - start)
        elif is_tensor or isinstance(value, dict) or _holds_tensors(value):
            raise ModelError(f"this model's {name} cannot be told of a chunk: leave out chunk_budget=N")
        else:
            yield name, value


def _holds_tensors(value: Any) -> bool:
    """Whether it is several of them, such as what images bring to several layers."""
    return isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value)
