"""A cache whose prompt may be read chunk by chunk, and cut in between; see `compresskv.attention.chunks`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from compresskv.attention.masks import without_masks
from compresskv.cache.end import queries_of_end
from compresskv.cache.eviction import Eviction
from compresskv.cache.full import branch
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.routed import RoutedCache
from compresskv.models.chunks import chunked_prompt_length
from compresskv.selection.cuts import ChunkStats, num_of_end


class ChunkedCache(RoutedCache):
    """Its layers are cut where its eviction says, by what the prompt's end attends to."""

    def __init__(self, layers: list[Any], eviction: Eviction) -> None:
        super().__init__(layers)
        self._eviction = eviction
        self._reads_maskless = False
        """Whether later chunks are read without a mask."""
        self._sees_end = False
        """Whether the pass under way reads the prompt to its end."""

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The full-attention layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def reads_in_chunks(self) -> bool:
        """Whether a prompt is read that is cut before its end."""
        return self._eviction.conditions.chunks is not None and self.compressed_layers[0].in_prefill

    def chunk_ends(self, num_new: int) -> list[int]:
        """Where the model is to stop while it reads so many new tokens, since the cache is cut there; and their end."""
        layer = self.compressed_layers[0]
        num_seen = layer.seen_tokens
        num_known = num_seen + num_new + self._eviction.num_later
        num_prompt = max(num_known, layer.num_prompt_tokens or chunked_prompt_length() or 0)
        self._sees_end = num_known == num_prompt
        ends = [end - num_seen for end in self._eviction.cuts(num_prompt) if num_seen < end < num_seen + num_new]
        return [*ends, num_new]

    @property
    def chunk_stats(self) -> ChunkStats | None:
        """How the prompt was cut while it was read; None where that was not asked for, or before its end."""
        layer = self.compressed_layers[0]
        return None if layer.in_prefill else self._eviction.chunk_stats(layer.num_prompt_tokens)

    @contextmanager
    def reading_chunk(self, num_after: int) -> Iterator[None]:
        """While the model reads a chunk of the prompt, before so many tokens more."""
        self._eviction.num_later, self._eviction.awaits_end = num_after, self.num_of_end(num_after) > 0
        try:
            with self._without_masks():
                yield
        finally:
            self._eviction.num_later, self._eviction.awaits_end = 0, False

    def _without_masks(self) -> AbstractContextManager[None]:
        return without_masks() if self._reads_maskless else nullcontext()

    def num_of_end(self, num_after: int) -> int:
        """How many tokens of the prompt's end are to be read before a cut, in front of so many tokens more.

        None where the method looks at no queries, or the end does not come in this pass.
        """
        return num_of_end(num_after, self._eviction.method.window_size) if self._sees_end else 0

    @torch.no_grad()
    def cut_chunk(self, read_end: Callable[["ChunkedCache"], object]) -> None:
        """Cut all layers by what the prompt's end attends to, behind what was read.

        Args:
            read_end: reads it into a cache.
        """
        with self._eviction.conditions.observer.evicting(), self._without_masks():
            other = branch(self)
            other.piece_tokens = None  # each layer's queries come at once
            size = self._eviction.method.num_observed()
            windows = queries_of_end(other.compressed_layers, size, lambda: read_end(other))
        for layer, window in zip(self.compressed_layers, windows, strict=True):
            layer.cut_chunk(window)
