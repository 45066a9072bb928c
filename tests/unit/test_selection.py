"""Selection against a plain Python reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresskv.selection.select import EMPTY_SLOT, select, select_rows

# Few distinct values, so that ties are common.
few = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 2.0, math.inf, math.nan])
many = st.floats(-1e4, 1e4, width=16)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def score_tensors(draw: st.DrawFn) -> Tensor:
    batch_size, num_heads, num_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    count = batch_size * num_heads * num_tokens
    numbers = draw(st.lists(draw(st.sampled_from([few, many])), min_size=count, max_size=count))
    return torch.tensor(numbers).view(batch_size, num_heads, num_tokens).to(draw(dtypes))


def naive_select(scores: list[float], budget: int, window_size: int) -> list[int]:
    num_tokens = len(scores)
    scores = [-math.inf if math.isnan(score) else score for score in scores]
    if budget >= num_tokens:
        return list(range(num_tokens))
    window = set(range(num_tokens - min(window_size, budget), num_tokens))
    others = sorted(set(range(num_tokens)) - window, key=lambda token: (-scores[token], token))
    return sorted(window | set(others[: budget - len(window)]))


@settings(deadline=None)
@given(score_tensors(), st.integers(1, 30), st.integers(0, 30))
def test_select_equals_the_reference(scores: Tensor, budget: int, window_size: int) -> None:
    indices = select(scores, budget, window_size)
    expected = [[naive_select(head, budget, window_size) for head in row] for row in scores.tolist()]
    assert indices.dtype == torch.long
    assert indices.tolist() == expected


@settings(deadline=None)
@given(score_tensors(), st.integers(1, 30), st.integers(0, 30))
def test_select_keeps_the_window_and_exact_counts(scores: Tensor, budget: int, window_size: int) -> None:
    num_tokens = scores.shape[2]
    indices = select(scores, budget, window_size)
    assert indices.shape == (*scores.shape[:2], min(budget, num_tokens))
    assert bool((indices.diff(dim=-1) > 0).all())  # ascending and unique
    assert int(indices.min()) >= 0
    assert int(indices.max()) < num_tokens
    num_recent = min(budget, window_size, num_tokens)
    recent = torch.arange(num_tokens - num_recent, num_tokens)
    assert bool((indices[..., indices.shape[2] - num_recent :] == recent).all())


@settings(deadline=None)
@given(score_tensors(), st.integers(0, 8), st.data())
def test_select_rows_equals_select_on_each_row_alone(scores: Tensor, window_size: int, data: st.DataObject) -> None:
    batch_size, _, num_tokens = scores.shape
    lengths = data.draw(st.lists(st.integers(1, num_tokens), min_size=batch_size, max_size=batch_size))
    budgets = data.draw(st.lists(st.integers(1, 30), min_size=batch_size, max_size=batch_size))
    for row, length in enumerate(lengths):
        scores[row, :, : num_tokens - length] = math.inf  # padding that would win if it were looked at
    indices = select_rows(scores, [[budget] for budget in budgets], window_size, lengths)

    kept = [min(budget, length) for budget, length in zip(budgets, lengths, strict=True)]
    assert indices.dtype == torch.long
    assert indices.shape == (batch_size, scores.shape[1], max(kept))
    for row, (length, num_kept) in enumerate(zip(lengths, kept, strict=True)):
        start = num_tokens - length
        num_unused = max(kept) - num_kept
        assert bool((indices[row, :, :num_unused] == EMPTY_SLOT).all())
        alone = select(scores[row : row + 1, :, start:], budgets[row], window_size)[0] + start
        assert indices[row, :, num_unused:].tolist() == alone.tolist()


# Scores that all KV heads share, too, are cut to each head's own count.
@settings(deadline=None)
@given(score_tensors(), st.integers(1, 3), st.integers(0, 8), st.data())
def test_select_rows_equals_select_on_each_head_alone(
    scores: Tensor, num_kv_heads: int, window_size: int, data: st.DataObject
) -> None:
    batch_size, num_heads, num_tokens = scores.shape
    num_kv_heads = num_kv_heads if num_heads == 1 else num_heads
    lengths = data.draw(st.lists(st.integers(1, num_tokens), min_size=batch_size, max_size=batch_size))
    counts = st.lists(st.integers(1, 30), min_size=num_kv_heads, max_size=num_kv_heads)
    budgets = data.draw(st.lists(counts, min_size=batch_size, max_size=batch_size))
    indices = select_rows(scores, budgets, window_size, lengths)
    assert indices.shape[:2] == (batch_size, num_kv_heads)
    longest = 0
    for row, length in enumerate(lengths):
        for head in range(num_kv_heads):
            own = scores[row, head if num_heads > 1 else 0, num_tokens - length :].tolist()
            expected = [num_tokens - length + token for token in naive_select(own, budgets[row][head], window_size)]
            kept = indices[row, head].tolist()
            assert kept == [EMPTY_SLOT] * (len(kept) - len(expected)) + expected
            longest = max(longest, len(expected))
    assert indices.shape[2] == longest


def test_ties_go_to_the_earlier_token() -> None:
    scores = torch.zeros(1, 1, 100)
    assert select(scores, 6, 2).tolist() == [[[0, 1, 2, 3, 98, 99]]]


def test_the_windows_own_scores_are_ignored() -> None:
    scores = torch.tensor([[[3.0, 1.0, 2.0, -math.inf, -math.inf]]])
    assert select(scores, 3, 2).tolist() == [[[0, 3, 4]]]


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_a_budget_within_the_window_keeps_the_most_recent(budget: int) -> None:
    scores = torch.arange(20.0, 0.0, -1.0)[None, None]  # the oldest score best
    assert select(scores, budget, 8).tolist() == [[list(range(20 - budget, 20))]]


@pytest.mark.parametrize("budget", [5, 6, 1000])
def test_a_budget_of_the_prompt_or_more_keeps_all(budget: int) -> None:
    assert select(torch.rand(2, 3, 5), budget, 2).tolist() == [[[0, 1, 2, 3, 4]] * 3] * 2


def test_the_result_can_be_written_to() -> None:
    """An expanded view would write through to all heads."""
    indices = select(torch.rand(2, 2, 4), 4, 4)
    indices[0, 0, 0] = 7
    assert indices[:, :, 0].tolist() == [[7, 0], [0, 0]]


def test_rows_with_one_index_set_per_layer() -> None:
    scores = torch.tensor([[[9.0, 9.0, 1.0, 5.0, 0.0]], [[1.0, 5.0, 2.0, 3.0, 0.0]]])
    indices = select_rows(scores, [[2], [3]], 1, [3, 5])
    assert indices.tolist() == [[[EMPTY_SLOT, 3, 4]], [[1, 3, 4]]]
