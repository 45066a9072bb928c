"""The window's attention over keys that come in pieces is the attention over all of them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from compresskv.selection.pieces import attention_in_pieces, moments_in_pieces, sums_in_pieces
from compresskv.selection.scores import heads_window_attention, sum_over_window, window_attention, window_moments

NUM_TOKENS, WINDOW = 50, 6
OPTIONS = [{"scaling": 0.5}, {"scaling": 2.0, "softcap": 3.0}]


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor]:
    """Queries of 4 heads, keys of 2."""
    torch.manual_seed(1)
    return torch.randn(1, 4, WINDOW, 8), torch.randn(1, 2, NUM_TOKENS, 8)


@pytest.mark.parametrize("size", [1, 3, 44, 47, 50])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "capped"])
def test_pieces_make_up_the_whole(options: dict[str, float], size: int, tensors: tuple[Tensor, Tensor]) -> None:
    """Also where an edge between pieces lies within the window."""
    queries, keys = tensors

    def pieces() -> Iterator[Tensor]:
        yield from keys.split(size, dim=2)

    def attention(heads: list[int] | None = None) -> Iterator[Tensor]:
        return attention_in_pieces(queries, pieces, NUM_TOKENS, heads, **options)

    torch.testing.assert_close(torch.cat(list(attention()), dim=-1), window_attention(queries, keys, **options))
    for found, expected in zip(
        moments_in_pieces(attention()), window_moments(window_attention(queries, keys, **options)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    some = heads_window_attention(queries, keys, [3, 0], **options)
    torch.testing.assert_close(sums_in_pieces(attention([3, 0])), sum_over_window(some))
