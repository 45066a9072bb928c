"""DefensiveKV's scores equal its formula, whatever is padded, and a short prompt has some, too."""

import numpy as np
import pytest
import torch

from compresskv.methods.defensivekv import DefensiveKV
from compresskv.methods.inputs import LayerInputs

NUM_TOKENS, WINDOW = 40, 6


def some_layer(num_tokens: int, starts: list[int]) -> LayerInputs:
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 2, num_tokens, 8, generator=generator) for _ in range(2))
    query = torch.randn(2, 4, WINDOW, 8, generator=generator) * 3
    valid = torch.arange(num_tokens) >= torch.tensor(starts)[:, None]
    return LayerInputs(0, query, keys, values, 8**-0.5, valid=valid)


def naive(layer: LayerInputs, row: int, kv_head: int, start: int) -> np.ndarray:
    """(older tokens,) of one KV head."""
    keys = layer.keys[row, kv_head, start:].double().numpy()
    length, seen = len(keys), []
    for query in layer.query_window[row, 2 * kv_head : 2 * kv_head + 2].double().numpy():
        for at, one in enumerate(query):
            weights = np.exp(keys[: length - WINDOW + at + 1] @ one * layer.scaling)
            older = (weights / weights.sum())[: length - WINDOW]
            pooled = np.convolve(older, np.full(5, 0.2), mode="same")
            seen.append(pooled * older.sum() / pooled.sum())
    largest = np.max(seen, axis=0)
    norms = layer.values[row, kv_head, start : start + length - WINDOW].norm(dim=-1).double().numpy()
    return np.maximum(largest, largest.mean()) * norms


def test_scores_equal_the_formula_in_padded_rows_too() -> None:
    starts = [0, 11]
    layer = some_layer(NUM_TOKENS, starts)
    scores = DefensiveKV(window_size=WINDOW).score(layer)
    assert scores.shape == (2, 2, NUM_TOKENS)
    for row, start in enumerate(starts):
        assert not scores[row, :, :start].any()
        for kv_head in range(2):
            found = scores[row, kv_head, start : NUM_TOKENS - WINDOW].double().numpy()
            expected = naive(layer, row, kv_head, start)
            # pooling at a row's beginning: padding is 0, as what lies before the text is
            np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("num_older", [0, 1, 2])
def test_a_prompt_about_as_long_as_the_window_has_scores(num_older: int) -> None:
    scores = DefensiveKV(window_size=WINDOW).score(some_layer(WINDOW + num_older, [0, 0]))
    assert torch.isfinite(scores).all()
    assert scores.shape[2] == WINDOW + num_older
