"""The blend against its docstring, written out with loops: the vote where it is read, local attention elsewhere."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vote import (
    LAYER_INDICES,
    WINDOW,
    keep,
    make_profile,
    naive_attention,
    naive_pool,
    naive_vote,
    padded,
    planted,
    prompts,
    row_alone,
)

from compresskv.errors import ConfigError
from compresskv.methods import registry
from compresskv.methods.blend import Blend
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.snapkv import SnapKV
from compresskv.methods.vote import Vote

Prompt = tuple[list[LayerInputs], list[list[float]]]
ERRORS = (0.2, 0.5, 0.3)


def make_blend(prompt: Prompt, **options: Any) -> Blend:
    layers, scores = prompt
    options = {"window_size": WINDOW, "narrow": False, **options}
    return Blend(**{"profile": make_profile(scores, layers[0].keys.shape[1]), **options})


def naive_local(layer: LayerInputs, row: int, gamma: float, kernel_size: int, num_sinks: int) -> np.ndarray:
    """(H_kv, T): mean and variance over the window by the value's norm, divided by their mean sum over KV heads."""
    num_kv_heads, groups = layer.keys.shape[1], layer.query_window.shape[1] // layer.keys.shape[1]
    num_older, local = layer.keys.shape[2] - layer.query_window.shape[2], []
    for kv_head in range(num_kv_heads):
        worth = np.zeros(num_older)
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            seen = naive_attention(layer, row, head)
            mean = sum(seen) / len(seen)
            variance = sum((one - mean) ** 2 for one in seen) / len(seen)
            worth += (mean + gamma * variance) / groups
        norms = np.sqrt((layer.values[row, kv_head, :num_older].numpy() ** 2).sum(axis=1))
        own = naive_pool(worth * norms, kernel_size)
        own[:num_sinks] = 0
        local.append(own)
    scale = sum(own.sum() for own in local) / num_kv_heads
    return np.array([own / scale if scale > 0 else own for own in local])


def naive_preference(layer: LayerInputs, row: int) -> float:
    """Entropy times variance, each summed over tokens and averaged over heads."""
    seen = [naive_attention(layer, row, head) for head in range(layer.query_window.shape[1])]
    entropy = np.mean([-sum(p * math.log(p) for p in one.mean(axis=0) if p > 0) for one in seen])
    return float(entropy * np.mean([one.var(axis=0).sum() for one in seen]))


def naive_shares(total: int, preferences: list[float], cap: int) -> list[float]:
    """In proportion, none above `cap`: by bisection for the level."""
    low, high = 0.0, (total + 1) / min(preferences)
    for _ in range(200):
        level = (low + high) / 2
        filled = sum(min(cap, level * own) for own in preferences)
        low, high = (level, high) if filled < total else (low, level)
    return [min(cap, high * own) for own in preferences]


def naive_heads(scores: list[list[float]], budget: int, guaranteed: float) -> list[list[int]]:
    """AdaKV: each head its own best (its sinks at least), then the best of all heads together."""
    num_tokens, spare = len(scores[0]), budget - WINDOW
    if spare <= 0 or budget >= num_tokens:
        return [list(range(max(0, num_tokens - budget), num_tokens))] * len(scores)
    kept, contested = [], []
    for head, own in enumerate(scores):
        ranked = sorted(range(num_tokens - WINDOW), key=lambda token, own=own: (-own[token], token))
        sinks = sum(math.isinf(score) for score in own[: num_tokens - WINDOW])
        sure = max(math.floor(guaranteed * spare), min(sinks, spare))
        kept.append([*ranked[:sure], *range(num_tokens - WINDOW, num_tokens)])
        contested += [(-own[token], head, token) for token in ranked[sure:]]
    for _, head, token in sorted(contested)[: budget * len(scores) - sum(map(len, kept))]:
        kept[head].append(token)
    return [sorted(tokens) for tokens in kept]


@settings(deadline=None, max_examples=60)
@given(prompts(), st.sampled_from([0.0, 0.3, 1.0, 5.0]), st.sampled_from([0.0, 200.0]), st.integers(0, 5), st.data())
def test_every_kv_head_weighs_the_vote_by_its_own_best_reader(
    prompt: Prompt, vote_weight: float, gamma: float, num_sinks: int, data: st.DataObject
) -> None:
    layers, head_scores = prompt
    kernel_size, vote_kernel_size = data.draw(st.sampled_from([(1, 25), (3, 1), (1, 5)]))
    num_heads = data.draw(st.integers(1, 30))
    method = make_blend(
        prompt, vote_weight=vote_weight, gamma=gamma, num_sinks=num_sinks, num_heads=num_heads,
        kernel_size=kernel_size, vote_kernel_size=vote_kernel_size,
    )  # fmt: skip
    best = max(max(row) for row in head_scores)
    for place, scores in enumerate(method.score_layers(list(map(method.observe, layers)))):
        batch_size, num_kv_heads, num_tokens, _ = layers[place].keys.shape
        groups = len(head_scores[0]) // num_kv_heads
        assert scores.shape == (batch_size, num_kv_heads, num_tokens)
        assert scores.dtype == torch.float32
        assert bool(torch.isinf(scores[..., :num_sinks]).all())
        for row in range(batch_size):
            vote = naive_vote(layers, row, head_scores, num_heads, vote_kernel_size)
            local = naive_local(layers[place], row, gamma, kernel_size, num_sinks)
            for kv_head in range(num_kv_heads):
                read = max(head_scores[place][kv_head * groups + i] for i in range(groups)) / best
                expected = (local[kv_head] + vote_weight * read * vote)[num_sinks:]
                np.testing.assert_allclose(scores[row, kv_head, num_sinks:], expected, atol=1e-5, rtol=1e-3)


@settings(deadline=None, max_examples=20)
@given(prompts())
def test_a_vote_without_weight_leaves_no_trace_of_the_profile(prompt: Prompt) -> None:
    layers, scores = prompt
    turned = [row[::-1] for row in scores[::-1]]
    methods = [make_blend((layers, rows), vote_weight=0) for rows in (scores, turned)]
    own, other = (method.score_layers(list(map(method.observe, layers))) for method in methods)
    for place, layer in enumerate(layers):
        assert torch.equal(own[place], other[place])
        for row in range(len(layer.keys)):
            expected = naive_local(layer, row, 200.0, 1, 4)[:, 4:]
            np.testing.assert_allclose(own[place][row, :, 4:], expected, atol=1e-5, rtol=1e-3)


def test_evidence_that_one_head_sees_reaches_the_kv_heads_that_retrieve_and_spares_the_others() -> None:
    """Every head looks at a token of its own; only head (3, 1) sees token 40. KV head 1 of layer 1 retrieves, too."""
    looks = {(layer, head): {10 + head: 20.0} for layer in LAYER_INDICES for head in range(4)}
    layers = planted({**looks, (3, 1): {40: 20.0}})
    profile = make_profile([[0, 0, 0, 0.9], [0, 1.0, 0, 0], [0, 0, 0, 0]])
    options: dict[str, Any] = {"num_heads": 1, "num_sinks": 0, "narrow": False, "profile": profile}
    budget = [WINDOW + 3] * 3  # as it stands, for every layer
    blend = keep(Blend(window_size=WINDOW, vote_kernel_size=1, **options), layers, budget)
    assert [[40 in head for head in layer[0]] for layer in blend] == [[False, True], [True, False], [False, False]]
    for layer in range(3):
        for kv_head in range(2):
            own = {10 + 2 * kv_head, 11 + 2 * kv_head} - ({11} if layer == 1 else set())
            assert own <= set(blend[layer][0][kv_head]), "lost what its own heads look at"
    vote = keep(Vote(window_size=WINDOW, kernel_size=1, **options), layers, budget)
    assert all(40 in head for layer in vote for head in layer[0])
    snapkv = keep(SnapKV(WINDOW, 1), layers, budget)
    assert [[40 in head for head in layer[0]] for layer in snapkv] == [[False, False], [True, False], [False, False]]


@settings(deadline=None, max_examples=60)
@given(prompts(), st.sampled_from([0.0, 0.2, 0.55, 1.0]), st.data())
def test_the_kv_heads_of_a_layer_share_as_in_adakv(prompt: Prompt, guaranteed: float, data: st.DataObject) -> None:
    layers, _ = prompt
    num_tokens = layers[0].keys.shape[2]
    budget = data.draw(st.lists(st.integers(1, num_tokens + 5), min_size=3, max_size=3))
    method = make_blend(prompt, guaranteed=guaranteed)
    scores = method.score_layers(list(map(method.observe, layers)))
    for layer, own in enumerate(keep(method, layers, budget)):
        for row, kept in enumerate(own):
            assert kept == naive_heads(scores[layer][row].tolist(), min(budget[layer], num_tokens), guaranteed)


@settings(deadline=None, max_examples=120)
@given(prompts(), st.integers(0, 6), st.sampled_from([0.0, 0.2, 1.0]), st.data())
def test_no_budget_loses_or_adds_a_token(
    prompt: Prompt, num_sinks: int, guaranteed: float, data: st.DataObject
) -> None:
    layers, _ = prompt
    num_kv_heads, num_tokens = layers[0].keys.shape[1:3]
    lengths = [data.draw(st.integers(1, num_tokens)) for _ in layers[0].keys]
    budget = data.draw(st.integers(1, num_tokens + 5))
    settled_layers = data.draw(st.sampled_from([0.0, 0.5, 2.0, 3.0, 9.0]))
    method = make_blend(prompt, num_sinks=num_sinks, guaranteed=guaranteed, settled_layers=settled_layers)
    assert method.profile is not None
    method = replace(method, profile=replace(method.profile, layer_errors=ERRORS))
    kept = keep(method, padded(layers, lengths), budget)
    for row, length in enumerate(lengths):
        mean, start = min(budget, length), num_tokens - length
        window = min(WINDOW, mean)
        totals = [sum(map(len, layer[row])) for layer in kept]
        assert sum(totals) == mean * num_kv_heads * 3
        floor = min(WINDOW + num_sinks, mean)
        if mean > floor:
            preferences = [naive_preference(one, 0) for one in row_alone(layers, row, length)]
            settled = min(settled_layers, 3)
            wanted = [
                settled * error + (3 - settled) * preference / sum(preferences)
                for error, preference in zip(ERRORS, preferences, strict=True)
            ]
            shares = naive_shares((mean - floor) * 3, wanted, length - floor)
            for total, share in zip(totals, shares, strict=True):
                assert total % num_kv_heads == 0
                assert abs(total / num_kv_heads - floor - share) < 1.01
        for total, layer in zip(totals, kept, strict=True):
            spare = total // num_kv_heads - window
            for tokens in layer[row]:
                assert tokens == sorted(set(tokens))
                assert tokens[0] >= start
                assert len(tokens) >= window + int(guaranteed * spare)
                assert tokens[len(tokens) - window :] == list(range(num_tokens - window, num_tokens))
                if mean >= WINDOW + num_sinks:
                    sinks = range(start, min(start + num_sinks, num_tokens))
                    assert set(sinks) <= set(tokens)


@settings(deadline=None, max_examples=60)
@given(prompts(), st.sampled_from([1, 5]), st.integers(0, 6), st.data())
def test_padding_does_not_change_a_rows_scores(
    prompt: Prompt, kernel_size: int, num_sinks: int, data: st.DataObject
) -> None:
    layers, _ = prompt
    num_tokens = layers[0].keys.shape[2]
    lengths = [data.draw(st.integers(1, num_tokens)) for _ in layers[0].keys]
    method = make_blend(prompt, kernel_size=kernel_size, vote_kernel_size=5, num_sinks=num_sinks)
    together = method.score_layers(list(map(method.observe, padded(layers, lengths))))
    for row, length in enumerate(lengths):
        older = slice(num_tokens - length, max(num_tokens - length, num_tokens - WINDOW))
        for padded_scores, alone in zip(
            together, method.score_layers(list(map(method.observe, row_alone(layers, row, length)))), strict=True
        ):
            assert not bool(padded_scores.isnan().any())
            expected = alone[..., : max(0, length - WINDOW)]
            torch.testing.assert_close(padded_scores[row : row + 1, :, older], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("lengths", [[60, 33], [9, 60], [60, 3]])
def test_a_row_of_a_padded_batch_keeps_what_it_keeps_alone(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    layers = []
    for i, layer_idx in enumerate(LAYER_INDICES):
        query = (2 + i) * torch.randn(2, 4, WINDOW, 4, generator=generator)
        keys = torch.randn(2, 2, 60, 4, generator=generator)
        layers.append(LayerInputs(layer_idx, query, keys, keys, 0.5))
    method = make_blend((layers, [[0.1, 0.2, 0, 1.5], [0.7, 0, 0.3, 0], [0, 0, 0, 0]]))
    together = keep(method, padded(layers, lengths), 14)
    for row, length in enumerate(lengths):
        alone = keep(method, row_alone(layers, row, length), 14)
        shifted = [[[token + 60 - length for token in head] for head in layer[0]] for layer in alone]
        assert [layer[row] for layer in together] == shifted


def test_heads_that_hold_different_tokens_vote_for_places_in_the_text() -> None:
    """As they do after a prompt was cut while it was read: a slot then means another token to each of them."""
    generator, num_read, num_held = torch.Generator().manual_seed(7), 90, 30
    layers = []
    for layer_idx in LAYER_INDICES:
        query, keys = (torch.randn(1, heads, size, 4, generator=generator) for heads, size in ((4, WINDOW), (2, 30)))
        kept = [torch.randperm(num_read - 1, generator=generator)[: num_held - 1].sort().values for _ in range(2)]
        positions = torch.nn.functional.pad(torch.stack(kept)[None], (0, 1), value=num_read - 1)
        layers.append(LayerInputs(layer_idx, 3 * query, keys, keys, 0.5, positions=positions))
    scores = [[0.1, 0.2, 0, 1.5], [0.7, 0, 0.3, 0.4], [0, 0, 0, 0.6]]
    options = {"num_heads": 5, "vote_kernel_size": 3, "num_sinks": 0}
    observed, local = (
        method.score_layers(list(map(method.observe, layers)))
        for method in (make_blend((layers, scores), **options), make_blend((layers, scores), vote_weight=0, **options))
    )
    vote = np.zeros(num_read)
    voters = sorted(((place, head) for place in range(3) for head in range(4)), key=lambda at: -scores[at[0]][at[1]])
    for place, head in voters[:5]:
        pooled = naive_pool(naive_attention(layers[place], 0, head).sum(axis=0), 3)
        own = np.zeros(num_held)
        own[: len(pooled)] = scores[place][head] * pooled / pooled.sum()
        vote[layers[place].positions[0, head // 2].numpy()] += own
    for layer, own, beside in zip(layers, observed, local, strict=True):
        row = scores[LAYER_INDICES.index(layer.layer_idx)]
        for head in range(2):
            read = max(row[2 * head : 2 * head + 2]) / 1.5
            expected = beside[0, head].numpy() + read * (vote / vote.sum())[layer.positions[0, head].numpy()]
            np.testing.assert_allclose(own[0, head].numpy(), expected, atol=1e-5)


def spreading(layer_idx: int) -> list[LayerInputs]:
    """One layer attends to all tokens alike, the others to few."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 2, 60, 4, generator=generator)
    query = torch.randn(1, 4, WINDOW, 4, generator=generator)
    return [LayerInputs(i, query * (3 if i == layer_idx else 0.1), keys, keys, 0.5) for i in LAYER_INDICES]


def test_a_layer_that_spreads_its_attention_gets_more() -> None:
    layers = spreading(3)
    method = make_blend((layers, [[1.0] * 4] * 3), settled_layers=0)
    counts = [sum(map(len, layer[0])) for layer in keep(method, layers, 14)]
    assert counts[1] > 2 * max(counts[0], counts[2])
    given = keep(method, layers, [10, 11, 12])
    assert [sum(map(len, layer[0])) for layer in given] == [20, 22, 24], "budgets given by the caller were shared out"


@pytest.mark.parametrize("layer_idx", LAYER_INDICES)
def test_no_prompt_starves_one_of_few_layers(layer_idx: int) -> None:
    """Three layers attend in full, as in Gemma 3 270M: what they keep is settled by the profile's errors."""
    layers = spreading(layer_idx)
    counts = [sum(map(len, layer[0])) for layer in keep(make_blend((layers, [[1.0] * 4] * 3)), layers, 16)]
    assert counts == [32, 32, 32]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("window_size", value) for value in (0, 1.5)),
        *(("kernel_size", value) for value in (0, 2, True)),
        *(("vote_kernel_size", value) for value in (0, -1, 2, 25.0)),
        *(("num_heads", value) for value in (0, 1.5, True)),
        *(("num_sinks", value) for value in (-1, 1.5)),
        *(("settled_layers", value) for value in (-0.5, math.inf)),
        *(("guaranteed", value) for value in (-0.1, 1.1, math.nan)),
        *(("vote_weight", value) for value in (-0.1, math.inf, math.nan)),
        *(("gamma", value) for value in (-1.0, math.inf)),
        *((tau, value) for tau in ("tau1", "tau2") for value in (0.0, -1.0)),
    ],
)
def test_an_option_that_cannot_work_is_not_taken(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{option}={value} must "):
        registry.create("blend", **{option: value})


def test_options_at_the_edge_are_taken() -> None:
    least = Blend(window_size=1, gamma=0, vote_kernel_size=1, vote_weight=0, num_heads=1, num_sinks=0, guaranteed=0)
    assert replace(least, guaranteed=1).guaranteed == 1
