"""What a method looks at in one layer of a paged cache: keys are gathered as they are asked for, in pieces if long."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor

from compresskv.methods.inputs import LayerInputs
from compresskv.selection.pieces import attention_in_pieces, moments_in_pieces, sums_in_pieces
from compresskv.serving.pages import Pages


class PagedInputs(LayerInputs):
    """`LayerInputs` over some KV heads of a layer's pages."""

    _pages: Pages
    _block_ids: Tensor
    _num_tokens: int
    _heads: slice
    _piece: int

    def __init__(
        self, pages: Pages, block_ids: Tensor, num_tokens: int, heads: slice, piece: int, **given: Any
    ) -> None:
        """Look at a prompt.

        Args:
            block_ids: (n,), the prompt's blocks.
            heads: the KV heads.
            piece: tokens that are looked at at once.
            given: the fields of `LayerInputs` but keys and values; queries of those heads.
        """
        own = {"_pages": pages, "_block_ids": block_ids, "_num_tokens": num_tokens, "_heads": heads, "_piece": piece}
        vars(self).update(own | given)  # its fields are frozen

    @cached_property
    def keys(self) -> Tensor:
        """All of them, for methods that look at keys themselves."""
        return self._pages.keys(self._block_ids, 0, self._num_tokens, self._heads)

    @property
    def values(self) -> Tensor:
        """None: no method that shares positions reads them."""
        return self.keys[..., :0]

    @property
    def num_kv_heads(self) -> int:
        """H_kv."""
        return int(self._heads.stop - self._heads.start)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self._num_tokens

    @cached_property
    def attention_moments(self) -> tuple[Tensor, Tensor]:
        """See `LayerInputs`."""
        if self._piece >= self._num_tokens:
            return super().attention_moments
        return moments_in_pieces(self._attention())

    def attention_sums(self, head_indices: list[int]) -> Tensor:
        """See `LayerInputs`."""
        if self._piece >= self._num_tokens:
            return super().attention_sums(head_indices)
        return sums_in_pieces(self._attention(head_indices))

    def _attention(self, head_indices: list[int] | None = None) -> Iterator[Tensor]:
        return attention_in_pieces(
            self.query_window,
            self._key_pieces,
            self._num_tokens,
            head_indices,
            scaling=self.scaling,
            softcap=self.softcap,
        )

    def _key_pieces(self) -> Iterator[Tensor]:
        for start in range(0, self._num_tokens, self._piece):
            yield self._pages.keys(self._block_ids, start, min(start + self._piece, self._num_tokens), self._heads)
