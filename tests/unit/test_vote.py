"""The vote against its docstring, written out with loops: the best heads of the whole model choose for all layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresskv.cache.conditions import Conditions
from compresskv.cache.eviction import Eviction
from compresskv.errors import ConfigError, ProfileError
from compresskv.methods import registry
from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.snapkv import SnapKV
from compresskv.methods.vote import Vote
from compresskv.methods.voting import count_votes, window_for_budget
from compresskv.models.fingerprint import Fingerprint
from compresskv.profiles.profile import Profile
from compresskv.selection.budgets import Budget
from compresskv.selection.select import EMPTY_SLOT

LAYER_INDICES = (1, 3, 4)
WINDOW = 4
Kept = list[list[list[list[int]]]]
"""For each layer, row and KV head, the tokens kept."""


def cast_vote(layers: list[LayerInputs], profile: Profile, num_heads: int, kernel_size: int) -> Tensor:
    """(B, 1, T): the vote before sinks are set."""
    method = Vote(
        num_heads=num_heads, kernel_size=kernel_size, num_sinks=0, local_weight=0, narrow=False, profile=profile
    )
    return count_votes([method.observe(layer) for layer in layers])


def make_profile(scores: Sequence[Sequence[float]], num_kv_heads: int = 2) -> Profile:
    """Of a model with 6 layers, of which those in LAYER_INDICES have full attention."""
    shape = Fingerprint("llama", 6, len(scores[0]), num_kv_heads, 8, 32, "0123456789abcdef")
    errors = (1 / 3,) * 3
    return Profile("org/model", shape, LAYER_INDICES, tuple(map(tuple, scores)), None, 3, {"text": errors}, errors)


@st.composite
def prompts(draw: st.DrawFn, most_older: int = 20) -> tuple[list[LayerInputs], list[list[float]]]:
    """The three layers of a prompt longer than the window, and head scores in which zeros and ties are common."""
    batch_size, num_kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_tokens = WINDOW + draw(st.integers(1, most_older))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    layers = []
    for layer_idx in LAYER_INDICES:
        query = 3 * torch.randn(batch_size, num_kv_heads * groups, WINDOW, 4, generator=generator)
        keys = torch.randn(batch_size, num_kv_heads, num_tokens, 4, generator=generator)
        values = torch.randn(keys.shape, generator=generator)
        layers.append(LayerInputs(layer_idx, query, keys, values, 0.5, draw(st.sampled_from([None, 2.0]))))
    row = st.lists(
        st.sampled_from([0.0, 0.1, 0.5, 2.0]), min_size=num_kv_heads * groups, max_size=num_kv_heads * groups
    )
    scores = draw(st.lists(row, min_size=3, max_size=3).filter(lambda rows: any(map(any, rows))))
    return layers, scores


def planted(looks: dict[tuple[int, int], dict[int, float]], groups: int = 2) -> list[LayerInputs]:
    """Three layers of 2 KV heads and 60 tokens: query head (layer, head) looks at tokens with the given logits."""
    keys = torch.eye(64)[:60].expand(1, 2, -1, -1)
    layers = []
    for layer_idx in LAYER_INDICES:
        query = torch.zeros(1, 2 * groups, WINDOW, 64)
        for head in range(2 * groups):
            for token, logit in looks.get((layer_idx, head), {}).items():
                query[0, head, :, token] = logit
        layers.append(LayerInputs(layer_idx, query, keys, keys, 1.0))
    return layers


def padded(layers: list[LayerInputs], lengths: list[int]) -> list[LayerInputs]:
    """The same layers with all but the last `lengths` tokens of each row as padding."""
    num_tokens = layers[0].keys.shape[2]
    valid = torch.arange(num_tokens) >= num_tokens - torch.tensor(lengths)[:, None]
    return [replace(layer, valid=valid) for layer in layers]


def row_alone(layers: list[LayerInputs], row: int, length: int) -> list[LayerInputs]:
    """The last `length` tokens of one row, without padding."""
    alone = []
    for layer in layers:
        keys, values = (one[row : row + 1, :, one.shape[2] - length :] for one in (layer.keys, layer.values))
        query = layer.query_window[row : row + 1, :, -min(WINDOW, length) :]
        alone.append(replace(layer, query_window=query, keys=keys, values=values, valid=None))
    return alone


class _Told:
    """A cache layer that notes what it is told to keep."""

    indices: Tensor | None = None

    def retain(self, indices: Tensor, scores: Tensor) -> None:
        self.indices = indices


def keep(method: Method, layers: list[LayerInputs], budget: Budget) -> Kept:
    """What the layers of a cache would keep."""
    eviction, told = Eviction(method, budget, Conditions(len(layers))), [_Told() for _ in layers]
    for position, (layer, inputs) in enumerate(zip(told, layers, strict=True)):
        eviction.end_of_prompt(layer, position, inputs)
    kept: Kept = []
    for layer, inputs in zip(told, layers, strict=True):
        batch_size, num_kv_heads, num_tokens, _ = inputs.keys.shape
        if layer.indices is None:
            valid = torch.ones(batch_size, num_tokens) if inputs.valid is None else inputs.valid
            kept.append([[row.nonzero().flatten().tolist()] * num_kv_heads for row in valid])
        else:
            rows = layer.indices.expand(-1, num_kv_heads, -1).tolist()
            kept.append([[[token for token in head if token != EMPTY_SLOT] for head in row] for row in rows])
    return kept


def naive_attention(layer: LayerInputs, row: int, head: int) -> np.ndarray:
    """(W, T - W): what each query of the window sees of the tokens before it."""
    num_query_heads, window_size, _ = layer.query_window.shape[1:]
    num_kv_heads, num_tokens = layer.keys.shape[1:3]
    query = layer.query_window[row, head].double().numpy()
    keys = layer.keys[row, head // (num_query_heads // num_kv_heads)].double().numpy()
    seen = []
    for i in range(window_size):
        logits = layer.scaling * keys[: num_tokens - window_size + i + 1] @ query[i]
        if layer.softcap is not None:
            logits = layer.softcap * np.tanh(logits / layer.softcap)
        weights = np.exp(logits - logits.max())
        seen.append(weights[: num_tokens - window_size] / weights.sum())
    return np.array(seen)


def naive_pool(older: np.ndarray, kernel_size: int) -> np.ndarray:
    """(T,): the mean over `kernel_size` neighbours; the window's own tokens and what lies outside count 0."""
    whole, half = [*older, *[0.0] * WINDOW], kernel_size // 2
    return np.array([sum(whole[max(0, i - half) : i + half + 1]) / kernel_size for i in range(len(whole))])


def naive_vote(
    layers: list[LayerInputs], row: int, scores: list[list[float]], num_heads: int, kernel_size: int
) -> np.ndarray:
    """(T,)."""
    places = [(place, head) for place in range(3) for head in range(len(scores[0]))]
    vote = np.zeros(layers[0].keys.shape[2])
    for place, head in sorted(places, key=lambda at: -scores[at[0]][at[1]])[:num_heads]:
        pooled = naive_pool(naive_attention(layers[place], row, head).sum(axis=0), kernel_size)
        vote += scores[place][head] * pooled / pooled.sum()
    return vote / vote.sum()


@settings(deadline=None, max_examples=60)
@given(prompts(), st.integers(1, 30), st.sampled_from([1, 3, 25]), st.integers(0, 6))
def test_every_layer_gets_the_formula_of_the_whole_models_best_heads(
    prompt: tuple[list[LayerInputs], list[list[float]]], num_heads: int, kernel_size: int, num_sinks: int
) -> None:
    layers, scores = prompt
    profile = make_profile(scores, layers[0].keys.shape[1])
    method = Vote(WINDOW, kernel_size, num_heads, num_sinks, 0.0, False, profile=profile)
    vote = cast_vote(layers, profile, num_heads, kernel_size)
    batch_size, num_tokens = layers[0].keys.shape[0], layers[0].keys.shape[2]
    torch.testing.assert_close(vote.sum(dim=-1), torch.ones(batch_size, 1))
    by_layer = method.score_layers(list(map(method.observe, layers)))
    assert len(by_layer) == 3
    for own in by_layer:
        assert own.shape == (batch_size, 1, num_tokens)
        assert own.dtype == torch.float32
        assert bool(torch.isinf(own[..., :num_sinks]).all())
        for row in range(batch_size):
            expected = naive_vote(layers, row, scores, num_heads, kernel_size)
            np.testing.assert_allclose(vote[row, 0], expected, atol=1e-6, rtol=1e-4)
            np.testing.assert_allclose(own[row, 0, num_sinks:], expected[num_sinks:], atol=1e-6, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(prompts(), st.floats(0.1, 3), st.integers(0, 6))
def test_what_all_heads_attend_to_is_added_by_square_roots(
    prompt: tuple[list[LayerInputs], list[list[float]]], local_weight: float, num_sinks: int
) -> None:
    layers, scores = prompt
    batch_size, num_kv_heads, num_tokens, _ = layers[0].keys.shape
    groups = layers[0].query_window.shape[1] // num_kv_heads
    method = Vote(WINDOW, 3, 4, num_sinks, local_weight, False, profile=make_profile(scores, num_kv_heads))
    own = method.score_layers(list(map(method.observe, layers)))[0]
    for row in range(batch_size):
        wanted = np.zeros(num_tokens - WINDOW)
        for layer in layers:
            for kv_head in range(num_kv_heads):
                seen = [naive_attention(layer, row, kv_head * groups + i) for i in range(groups)]
                local = sum(one.mean(axis=0) + 200 * one.var(axis=0) for one in seen)
                local[:num_sinks] = 0
                if local.sum() > 0:
                    wanted += np.sqrt(local / local.sum())
        older = slice(num_sinks, num_tokens - WINDOW)
        if wanted.sum() > 0:
            wanted /= wanted.sum()
        expected = naive_vote(layers, row, scores, 4, 3)[older] + local_weight * wanted[older]
        np.testing.assert_allclose(own[row, 0, older], expected, atol=1e-5, rtol=1e-3)


def test_two_good_heads_of_one_layer_are_not_passed_over_for_the_best_of_another() -> None:
    looks = {(3, 0): {20: 20.0}, (3, 3): {30: 20.0}, (1, 0): {40: 20.0}}
    profile = make_profile([[0.5, 0, 0, 0], [3.0, 0, 0, 1.0], [0.1, 0, 0, 0]])
    vote = cast_vote(planted(looks), profile, 2, 1)[0, 0]
    assert vote[[20, 30, 40]].tolist() == pytest.approx([0.75, 0.25, 0], abs=1e-5)


def test_a_head_that_looks_mostly_at_the_window_still_counts_by_its_score() -> None:
    """Unnormalised, head (1, 0) would have less than a hundredth of the other's vote."""
    looks = {(1, 0): {20: 15.0, **dict.fromkeys(range(56, 60), 20.0)}, (4, 2): {40: 20.0}}
    profile = make_profile([[2.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1.0, 0]])
    vote = cast_vote(planted(looks), profile, 2, 1)[0, 0]
    assert float(vote[20] / vote[40]) == pytest.approx(2, rel=1e-3)


def test_a_head_beyond_the_number_of_voters_or_with_score_zero_has_no_say() -> None:
    looks = {(1, 0): {20: 20.0}, (3, 0): {30: 20.0}, (4, 0): {40: 20.0}}
    profile = make_profile([[2.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0]])
    assert cast_vote(planted(looks), profile, 1, 1)[0, 0, 20] == pytest.approx(1, abs=1e-5)
    assert cast_vote(planted(looks), profile, 99, 1)[0, 0, 40] < 1e-6


def test_the_window_does_not_lift_the_tokens_before_it() -> None:
    looks = {(3, 0): {56: 20.0, 20: 10.0}}
    profile = make_profile([[0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0]])
    kept = keep(Vote(WINDOW, 5, 1, 0, 0.0, False, profile=profile), planted(looks), WINDOW + 5)
    assert kept == [[[[*range(18, 23), *range(56, 60)]] * 2]] * 3


def test_what_one_layers_retrieval_head_sees_is_not_lost_in_the_others() -> None:
    """SnapKV keeps it only where that head reads."""
    looks = {(layer, head): {10 + head: 20.0} for layer in LAYER_INDICES for head in range(4)}
    layers = planted({**looks, (3, 1): {40: 20.0}})
    profile = make_profile([[0.1, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0.1, 0]])
    kept = keep(Vote(WINDOW, 1, 1, 0, 0.0, False, profile=profile), layers, WINDOW + 1)
    assert kept == [[[[40, 56, 57, 58, 59]] * 2]] * 3
    snapkv = keep(SnapKV(WINDOW, 1), layers, WINDOW + 2)
    assert [[40 in head for head in layer[0]] for layer in snapkv] == [[False, False], [True, False], [False, False]]


@settings(deadline=None, max_examples=60)
@given(prompts(), st.sampled_from([1, 5, 25]), st.integers(0, 6), st.data())
def test_padding_does_not_change_what_a_row_votes(
    prompt: tuple[list[LayerInputs], list[list[float]]], kernel_size: int, num_sinks: int, data: st.DataObject
) -> None:
    layers, scores = prompt
    num_tokens = layers[0].keys.shape[2]
    lengths = [data.draw(st.integers(1, num_tokens)) for _ in layers[0].keys]
    method = Vote(
        WINDOW,
        kernel_size,
        3,
        num_sinks,
        data.draw(st.sampled_from([0.0, 0.5])),
        False,
        profile=make_profile(scores, layers[0].keys.shape[1]),
    )
    together = method.score_layers(list(map(method.observe, padded(layers, lengths))))[0]
    assert not bool(together.isnan().any())
    for row, length in enumerate(lengths):
        alone = method.score_layers(list(map(method.observe, row_alone(layers, row, length))))[0]
        older = slice(num_tokens - length, max(num_tokens - length, num_tokens - WINDOW))
        expected = alone[..., : max(0, length - WINDOW)]
        torch.testing.assert_close(together[row : row + 1, :, older], expected, atol=1e-6, rtol=1e-4)


@settings(deadline=None, max_examples=100)
@given(prompts(), st.integers(0, 6), st.data())
def test_no_layer_head_or_row_keeps_another_list_or_number(
    prompt: tuple[list[LayerInputs], list[list[float]]], num_sinks: int, data: st.DataObject
) -> None:
    layers, scores = prompt
    num_tokens = layers[0].keys.shape[2]
    lengths = [data.draw(st.integers(1, num_tokens)) for _ in layers[0].keys]
    budget = data.draw(st.integers(1, num_tokens + 5))
    method = Vote(
        WINDOW,
        3,
        4,
        num_sinks,
        data.draw(st.sampled_from([0.0, 0.5])),
        False,
        profile=make_profile(scores, layers[0].keys.shape[1]),
    )
    kept = keep(method, padded(layers, lengths), budget)
    assert kept[0] == kept[1] == kept[2]
    for heads, length in zip(kept[0], lengths, strict=True):
        tokens, start, recent = heads[0], num_tokens - length, min(WINDOW, budget, length)
        assert all(head == tokens for head in heads)
        assert len(set(tokens)) == len(tokens) == min(budget, length)
        assert tokens == sorted(tokens)
        assert tokens[0] >= start
        assert tokens[len(tokens) - recent :] == list(range(num_tokens - recent, num_tokens))
        sinks = min(num_sinks, length, max(0, budget - WINDOW))
        assert tokens[:sinks] == list(range(start, start + sinks))


def test_budgets_given_for_each_layer_take_the_votes_best() -> None:
    looks = {(3, 0): {20: 22.0, 30: 21.0, 40: 20.0}}
    profile = make_profile([[0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0]])
    kept = keep(Vote(WINDOW, 1, 1, 0, 0.0, False, profile=profile), planted(looks), [5, 2, 7])
    assert [layer[0][0][:-2] for layer in kept] == [[20, 56, 57], [], [20, 30, 40, 56, 57]]


@pytest.mark.parametrize("name", ["vote", "blend"])
def test_a_profile_that_cannot_compare_layers_is_refused_with_what_to_do(name: str) -> None:
    profile = make_profile([[1.0, 0, 0, 0]] * 3)
    method, layers = registry.create(name, window_size=WINDOW), planted({})
    with pytest.raises(ProfileError, match=f"'{name}' needs a profile .*'compresskv profile MODEL'"):
        method.score_layers(list(map(method.observe, layers)))
    with pytest.raises(ProfileError, match=f"'{name}' compares .* org/model holds ranks .*'compresskv profile MODEL'"):
        method.with_profile(replace(profile, num_runs=0))
    measured = method.with_profile(profile)
    assert len(measured.score_layers(list(map(measured.observe, layers)))) == 3
    assert (method.profile, measured.profile) == (None, profile)


@pytest.mark.parametrize(
    ("option", "value"),
    [("window_size", 0), ("num_heads", 0), ("num_sinks", -1), ("kernel_size", 0), ("kernel_size", 4)]
    + [(option, value) for option in ("window_size", "num_heads", "num_sinks", "kernel_size") for value in (1.5, True)],
)
def test_an_option_that_cannot_work_is_not_taken(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{option}={value} must "):
        registry.create("vote", **{option: value})


def test_options_at_the_edge_are_taken() -> None:
    assert Vote(window_size=1, kernel_size=1, num_heads=1, num_sinks=0).num_sinks == 0


@given(st.integers(1, 64), st.integers(1, 5000))
def test_a_narrowed_window_leaves_half_of_the_budget_and_no_large_budget_is_narrowed(window: int, budget: int) -> None:
    narrow = window_for_budget(window, budget)
    assert 1 <= narrow <= window
    assert narrow <= max(1, budget // 2)
    assert narrow == window or budget < 4 * window
    assert narrow <= window_for_budget(window, budget + 1)


@pytest.mark.parametrize("name", ["vote", "blend"])
def test_a_small_budget_observes_and_keeps_a_narrower_window(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    layers = []
    for layer_idx in LAYER_INDICES:
        query, keys = torch.randn(1, 4, 32, 4, generator=generator), torch.randn(1, 2, 90, 4, generator=generator)
        layers.append(LayerInputs(layer_idx, query * 3, keys, keys, 0.5))
    profile = make_profile([[0.2, 0.9, 0.1, 0.4], [1.0, 0.3, 0, 0], [0, 0, 0.5, 0]])
    narrowing = registry.create(name, profile=profile)
    for budget, window in ((40, 18), (20, 10), (3, 1)):
        fixed = registry.create(name, profile=profile, narrow=False, window_size=window)
        cut = [replace(layer, query_window=layer.query_window[:, :, -window:]) for layer in layers]
        assert keep(narrowing, layers, budget) == keep(fixed, cut, budget)
    assert keep(narrowing, layers, 20) != keep(registry.create(name, profile=profile, narrow=False), layers, 20)


@given(data=st.data())
def test_heads_on_several_ranks_vote_as_one(data: st.DataObject) -> None:
    """Tensor parallelism: each rank has some heads; the sum of votes and the mean of wishes are the whole layer's."""
    layers, scores = data.draw(prompts())
    profile, layer = make_profile(scores), layers[0]
    vote = Vote(profile=profile, window_size=2, kernel_size=3, num_heads=3, num_sinks=1)
    whole = vote.observe(layer)
    num_heads, num_kv_heads = layer.query_window.shape[1], layer.keys.shape[1]
    here, kv_here = num_heads // num_kv_heads, 1  # a rank for each KV head
    parts = [
        vote.observe(
            replace(
                layer,
                query_window=layer.query_window[:, rank * here : (rank + 1) * here],
                keys=layer.keys[:, rank * kv_here : (rank + 1) * kv_here],
                first_head=rank * here,
            )
        )
        for rank in range(num_kv_heads)
    ]
    votes = [part.vote for part in parts if part.vote is not None]
    assert (whole.vote is None) == (not votes)
    if whole.vote is not None:
        torch.testing.assert_close(sum(votes), whole.vote)
    assert whole.scores is not None
    torch.testing.assert_close(torch.stack([part.scores for part in parts]).mean(dim=0), whole.scores)


def test_layers_that_it_does_not_read() -> None:
    profile = make_profile([[0.1, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]])
    layers = profile.layer_indices
    heads_only = Vote(profile=profile, num_heads=2, local_weight=0)
    assert [heads_only.reads_layer(layer) for layer in layers] == [False, True, True]
    assert all(Vote(profile=profile, num_heads=2).reads_layer(layer) for layer in layers)
