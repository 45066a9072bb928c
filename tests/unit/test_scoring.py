"""Scoring against loops over heads and tokens that follow the formulas word by word."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresskv.selection import scores as scoring
from compresskv.selection.scores import heads_window_attention, pool, window_attention


def naive_window_attention(
    query_window: Tensor, keys: Tensor, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """Keys repeated per query head, an explicit causal mask, one row at a time."""
    batch_size, num_query_heads, window_size, _ = query_window.shape
    num_tokens = keys.shape[2]
    repeated = keys.repeat_interleave(num_query_heads // keys.shape[1], dim=1)
    attention = torch.zeros(batch_size, num_query_heads, window_size, num_tokens)
    for row in range(batch_size):
        for head in range(num_query_heads):
            for i in range(window_size):
                logits = (query_window[row, head, i : i + 1] @ repeated[row, head].T)[0].float() * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                position = num_tokens - window_size + i
                visible = torch.arange(num_tokens) <= position
                attention[row, head, i] = logits.where(visible, -math.inf).softmax(-1)
    return attention


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(query_window, keys) of any small shape."""
    batch_size, num_kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window_size, extra, head_dim = draw(st.integers(1, 5)), draw(st.integers(0, 12)), draw(st.sampled_from([2, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    query = torch.randn(batch_size, num_kv_heads * groups, window_size, head_dim, generator=generator)
    keys = torch.randn(batch_size, num_kv_heads, window_size + extra, head_dim, generator=generator)
    return 3 * query, keys


class TestWindowAttention:
    @settings(deadline=None, max_examples=60)
    @given(layers(), st.sampled_from([None, 1.5, 30.0]), st.sampled_from([torch.float32, torch.bfloat16]))
    def test_equals_a_loop_over_heads(
        self, layer: tuple[Tensor, Tensor], softcap: float | None, dtype: torch.dtype
    ) -> None:
        query, keys = (states.to(dtype) for states in layer)
        attention = window_attention(query, keys, scaling=0.5, softcap=softcap)
        expected = naive_window_attention(query, keys, scaling=0.5, softcap=softcap)
        assert attention.dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(attention, expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))

    @settings(deadline=None, max_examples=60)
    @given(layers())
    def test_no_query_sees_the_future(self, layer: tuple[Tensor, Tensor]) -> None:
        attention = window_attention(*layer, scaling=0.5)
        window_size, num_tokens = attention.shape[2:]
        future = torch.ones(window_size, num_tokens, dtype=torch.bool).triu(num_tokens - window_size + 1)
        assert bool((attention[..., future] == 0).all())
        assert bool((attention[..., ~future] > 0).all())

    @settings(deadline=None, max_examples=60)
    @given(layers(), st.data())
    def test_a_padded_row_equals_the_row_alone(self, layer: tuple[Tensor, Tensor], data: st.DataObject) -> None:
        """Rows at least as long as the window: shorter ones keep their most recent tokens, unscored."""
        query, keys = layer
        window_size, num_tokens = query.shape[2], keys.shape[2]
        lengths = [data.draw(st.integers(window_size, num_tokens)) for _ in keys]
        valid = torch.arange(num_tokens) >= num_tokens - torch.tensor(lengths)[:, None]
        keys = keys.masked_fill(~valid[:, None, :, None], 100.0)  # what padding holds must not matter
        attention = window_attention(query, keys, scaling=0.5, valid=valid)
        for row, length in enumerate(lengths):
            start = num_tokens - length
            alone = window_attention(query[row : row + 1], keys[row : row + 1, :, start:], scaling=0.5)
            torch.testing.assert_close(attention[row : row + 1, ..., start:], alone, atol=1e-5, rtol=1e-5)
            assert bool((attention[row, ..., :start] == 0).all())

    def test_the_query_of_a_padding_token_gives_no_nan(self) -> None:
        valid = torch.tensor([[False, False, False, False, True]])
        attention = window_attention(torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4), scaling=1.0, valid=valid)
        torch.testing.assert_close(attention.sum(-1), torch.ones(1, 2, 3))
        assert attention[0, :, 2].tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0]] * 2

    def test_large_logits_do_not_overflow(self) -> None:
        query, keys = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
        query[..., 0] = 1e4
        keys[0, 0, 1, 0] = 1e4
        assert window_attention(query, keys, scaling=1.0).tolist() == [[[[0.0, 1.0, 0.0]]]]

    def test_inputs_are_left_as_they_are(self) -> None:
        query, keys = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 6, 8)
        before = query.clone(), keys.clone()
        window_attention(query, keys, scaling=0.5, softcap=2.0, valid=torch.ones(1, 6, dtype=torch.bool))
        assert torch.equal(query, before[0])
        assert torch.equal(keys, before[1])

    @pytest.mark.parametrize(
        ("query_shape", "keys_shape", "message"),
        [
            ((1, 4, 6, 8), (1, 2, 5, 8), "5 keys are fewer than the window's 6 queries"),
            ((1, 5, 2, 8), (1, 2, 5, 8), "5 query heads are no multiple of 2 KV heads"),
            ((1, 2, 2, 8), (1, 4, 5, 8), "2 query heads are no multiple of 4 KV heads"),
        ],
    )
    def test_shapes_that_cannot_be(
        self, query_shape: tuple[int, ...], keys_shape: tuple[int, ...], message: str
    ) -> None:
        query, keys = torch.zeros(query_shape), torch.zeros(keys_shape)
        with pytest.raises(ValueError, match=message):
            window_attention(query, keys, scaling=1.0)
        with pytest.raises(ValueError, match=message):
            heads_window_attention(query, keys, [0], scaling=1.0)


class TestHeadsWindowAttention:
    @settings(deadline=None, max_examples=60)
    @given(layers(), st.sampled_from([None, 1.5]), st.data())
    def test_equals_the_rows_of_the_full_attention(
        self, layer: tuple[Tensor, Tensor], softcap: float | None, data: st.DataObject
    ) -> None:
        query, keys = layer
        heads = data.draw(st.lists(st.integers(0, query.shape[1] - 1), min_size=1, unique=True))
        valid = torch.arange(keys.shape[2]) >= torch.tensor([[0], [1]])[: len(keys)]
        options = {"scaling": 0.5, "softcap": softcap, "valid": valid}
        some = heads_window_attention(query, keys, heads, **options)
        torch.testing.assert_close(some, window_attention(query, keys, **options)[:, heads])

    @pytest.mark.parametrize("head", [-1, 4, 100])
    def test_a_head_that_is_not_there(self, head: int) -> None:
        with pytest.raises(ValueError, match=f"query head {head} .* 4"):
            heads_window_attention(torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 5, 8), [0, head], scaling=1.0)


class _Allocations(TorchDispatchMode):
    """Records the bytes of every new storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.nbytes.append(leaf.untyped_storage().nbytes())
        return result


@contextmanager
def allocations() -> Iterator[list[int]]:
    with _Allocations() as mode:
        yield mode.nbytes


class TestMemory:
    """Long prompts: T keys of D = 64 are far larger than W = 2 rows of attention."""

    window_size, num_tokens, head_dim = 2, 512, 64

    def _layer(self, batch_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        query = torch.randn(batch_size, 8, self.window_size, self.head_dim, dtype=dtype)
        keys = torch.randn(batch_size, 2, self.num_tokens, self.head_dim, dtype=dtype)
        return query, keys

    def test_the_recorder_sees_a_copy_of_keys(self) -> None:
        _, keys = self._layer(1, torch.float32)
        with allocations() as nbytes:
            keys.repeat_interleave(4, dim=1)
            keys.transpose(1, 2).view(torch.int32)
        assert max(nbytes) == 4 * keys.nbytes

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("padded", [False, True])
    def test_some_heads_take_no_more_than_their_attention(
        self, batch_size: int, dtype: torch.dtype, padded: bool
    ) -> None:
        query, keys = self._layer(batch_size, dtype)
        valid = torch.ones(batch_size, self.num_tokens, dtype=torch.bool) if padded else None
        heads = [5, 0, 3]
        with allocations() as nbytes:
            heads_window_attention(query, keys, heads, scaling=0.1, softcap=5.0, valid=valid)
        assert max(nbytes) <= batch_size * len(heads) * self.window_size * self.num_tokens * 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keys_are_not_copied_per_query_head(self, dtype: torch.dtype) -> None:
        query, keys = self._layer(3, dtype)
        with allocations() as nbytes:
            attention = window_attention(query, keys, scaling=0.1)
        assert max(nbytes) <= attention.nbytes

    def test_keys_in_another_memory_order_are_copied_once_at_most(self) -> None:
        """(B, T, H, D) memory, as a projection leaves it: a batched product may need one copy, but not one a head."""
        query, _ = self._layer(3, torch.float32)
        keys = torch.randn(3, self.num_tokens, 2, self.head_dim).transpose(1, 2)
        with allocations() as nbytes:
            attention = window_attention(query, keys, scaling=0.1)
        assert max(nbytes) <= max(attention.nbytes, keys.nbytes)
        assert sum(size >= keys.nbytes for size in nbytes) <= 1


class TestWaysOfDevices:
    """CPUs and GPUs take other ways to the same numbers."""

    @settings(deadline=None, max_examples=60)
    @given(layers())
    def test_products(self, layer: tuple[Tensor, Tensor]) -> None:
        query, keys = layer
        grouped = query.reshape(keys.shape[0], keys.shape[1], -1, keys.shape[3])
        ways = (scoring._products_at_once, scoring._products_by_head)
        one, other = (way(grouped, keys, list(range(keys.shape[1]))) for way in ways)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    @settings(deadline=None, max_examples=80)
    @given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.integers(0, 10**6))
    def test_softmax_in_place(self, num_heads: int, window_size: int, num_tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = 5 * torch.randn(1, num_heads, window_size, num_tokens, generator=generator)
        logits[..., num_tokens // 2 :] = torch.finfo(torch.float32).min
        expected = logits.softmax(dim=-1)
        for way in (scoring._softmax_, scoring._plain_softmax_):
            given = logits.clone()
            assert way(given).data_ptr() == given.data_ptr()
            torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-6)


class TestPool:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 20), st.sampled_from([1, 3, 5, 7, 25]), st.integers(0, 10**6))
    def test_equals_a_loop_over_tokens(self, num_tokens: int, kernel_size: int, seed: int) -> None:
        scores = torch.rand(2, 3, num_tokens, generator=torch.Generator().manual_seed(seed))
        half = kernel_size // 2
        expected = torch.zeros_like(scores)
        for token in range(num_tokens):
            for other in range(max(0, token - half), min(num_tokens, token + half + 1)):
                expected[..., token] += scores[..., other] / kernel_size
        pooled = pool(scores, kernel_size)
        assert pooled.shape == scores.shape
        torch.testing.assert_close(pooled, expected)

    def test_a_kernel_of_one_changes_nothing(self) -> None:
        scores = torch.rand(1, 2, 7)
        assert torch.equal(pool(scores, 1), scores)
