"""Each method against its formula (ALGORITHM, sections 2 and 5), written out with loops."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresskv.errors import ConfigError, ProfileError
from compresskv.methods import registry
from compresskv.methods.adakv import AdaKV
from compresskv.methods.base import Method
from compresskv.methods.cake import CAKE
from compresskv.methods.compresskv import CompressKV
from compresskv.methods.headkv import HeadKV
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.keydiff import KeyDiff
from compresskv.methods.knorm import KNorm
from compresskv.methods.kvzip import KVzip
from compresskv.methods.snapkv import SnapKV
from compresskv.models.fingerprint import Fingerprint
from compresskv.profiles.profile import Profile
from compresskv.selection import sharing
from compresskv.selection.select import EMPTY_SLOT, select, select_rows

LAYER_INDICES = (1, 3, 4)


def make_profile(scores: list[list[float]], errors: list[float] | None = None) -> Profile:
    """Of a model with 6 layers, of which those in LAYER_INDICES have full attention."""
    errors = errors or [1 / len(scores)] * len(scores)
    shape = Fingerprint("llama", 6, len(scores[0]), 2, 8, 32, "0123456789abcdef")
    rows = tuple(map(tuple, scores))
    return Profile("org/model", shape, LAYER_INDICES, rows, None, 3, {"text": tuple(errors)}, tuple(errors))


def naive_head_scores(query: Tensor, keys: Tensor, scaling: float, kernel_size: int) -> Tensor:
    """One head's scores (T - W,) of the tokens before the window, as section 2 spells it.

    Args:
        query: (W, D). keys: (T, D), of the KV head that the query head reads.
    """
    window_size, num_tokens = len(query), len(keys)
    summed = torch.zeros(num_tokens, dtype=torch.float64)
    for i in range(window_size):
        visible = num_tokens - window_size + i + 1
        summed[:visible] += ((keys[:visible].double() @ query[i].double()) * scaling).softmax(-1)
    older = summed[: num_tokens - window_size].tolist()  # drop the last W columns, then pool
    half = kernel_size // 2
    padded = [0.0] * half + older + [0.0] * half
    return torch.tensor([math.fsum(padded[j : j + kernel_size]) / kernel_size for j in range(len(older))])


@st.composite
def inputs(draw: st.DrawFn, window_size: int = 8) -> LayerInputs:
    """A layer with more tokens than its window."""
    batch_size, num_kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_tokens = window_size + draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    query = 3 * torch.randn(batch_size, num_kv_heads * groups, window_size, 4, generator=generator)
    keys = torch.randn(batch_size, num_kv_heads, num_tokens, 4, generator=generator)
    return LayerInputs(layer_idx=3, query_window=query, keys=keys, values=keys, scaling=0.5)


def planted(strengths: list[tuple[int, float]], num_kv_heads: int, layer_idx: int = 3) -> LayerInputs:
    """Query head h looks at token strengths[h][0] with logit strengths[h][1]; all KV heads hold the same keys."""
    num_tokens, window_size, head_dim = 60, 8, 64
    keys = torch.eye(head_dim)[:num_tokens].expand(1, num_kv_heads, -1, -1)
    query = torch.zeros(1, len(strengths), window_size, head_dim)
    for head, (token, logit) in enumerate(strengths):
        query[0, head, :, token] = logit
    return LayerInputs(layer_idx=layer_idx, query_window=query, keys=keys, values=keys, scaling=1.0)


class TestSnapKV:
    @settings(deadline=None, max_examples=50)
    @given(inputs(), st.sampled_from([1, 5, 7]))
    def test_equals_the_formula(self, layer: LayerInputs, kernel_size: int) -> None:
        scores = SnapKV(kernel_size=kernel_size).score(layer)
        batch_size, num_query_heads, window_size, _ = layer.query_window.shape
        num_kv_heads, num_tokens = layer.keys.shape[1:3]
        groups = num_query_heads // num_kv_heads
        assert scores.shape == (batch_size, num_kv_heads, num_tokens)
        assert scores.dtype == torch.float32
        for row in range(batch_size):
            for kv_head in range(num_kv_heads):
                readers = [head for head in range(num_query_heads) if head // groups == kv_head]
                per_head = [
                    naive_head_scores(layer.query_window[row, head], layer.keys[row, kv_head], 0.5, kernel_size)
                    for head in readers
                ]
                expected = torch.stack(per_head).mean(0)
                older = scores[row, kv_head, : num_tokens - window_size]
                torch.testing.assert_close(older, expected, atol=1e-5, rtol=1e-5)

    def test_each_kv_head_is_scored_by_the_heads_that_read_it(self) -> None:
        """CompressKV's published baseline groups heads 0, 2 and 1, 3: both KV heads would keep token 40."""
        layer = planted([(20, 20.0), (20, 20.0), (40, 25.0), (40, 25.0)], num_kv_heads=2)
        indices = select(SnapKV(kernel_size=1).score(layer), 9, 8)
        assert indices[0, :, 0].tolist() == [20, 40]

    def test_what_the_window_sees_in_itself_does_not_reach_its_neighbours(self) -> None:
        """Section 2 drops the window's columns before it pools: token 51 stands beside a window that looks at 52."""
        layer = planted([(52, 20.0), (20, 5.0)], num_kv_heads=1)
        indices = select(SnapKV().score(layer), 8 + 5, 8)
        assert indices[0, 0].tolist() == [*range(18, 23), *range(52, 60)]


class TestCompressKV:
    @settings(deadline=None, max_examples=50)
    @given(inputs(), st.sampled_from([1, 5, 7]), st.integers(1, 6), st.data())
    def test_equals_the_formula(
        self, layer: LayerInputs, kernel_size: int, heads_per_layer: int, data: st.DataObject
    ) -> None:
        batch_size, num_query_heads, window_size, _ = layer.query_window.shape
        num_kv_heads, num_tokens = layer.keys.shape[1:3]
        ranking = data.draw(st.permutations(range(num_query_heads)))
        other = [1.0] * num_query_heads
        measured = [float(num_query_heads - ranking.index(head)) for head in range(num_query_heads)]
        profile = make_profile([other, measured, other])  # layer 3 stands second
        method = CompressKV(kernel_size=kernel_size, heads_per_layer=heads_per_layer, profile=profile)
        scores = method.score(layer)
        assert scores.shape == (batch_size, 1, num_tokens)
        assert scores.dtype == torch.float32
        for row in range(batch_size):
            best = ranking[:heads_per_layer]
            per_head = [
                naive_head_scores(
                    layer.query_window[row, head],
                    layer.keys[row, head // (num_query_heads // num_kv_heads)],
                    0.5,
                    kernel_size,
                )
                for head in best
            ]
            older = scores[row, 0, : num_tokens - window_size]
            torch.testing.assert_close(older, torch.stack(per_head).mean(0), atol=1e-5, rtol=1e-5)

    def test_the_best_head_of_the_layer_reads_its_own_kv_head(self) -> None:
        """Head 1 of 4 reads KV head 0. With groups and KV heads swapped it would read 1 and find token 40."""
        layer = planted([(9, 30.0), (20, 30.0), (9, 30.0), (9, 30.0)], num_kv_heads=2)
        keys = layer.keys.clone()
        keys[0, 1] = keys[0, 1].roll(20, dims=0)  # KV head 1 holds at token 40 what KV head 0 holds at 20
        layer = LayerInputs(3, layer.query_window, keys, keys, 1.0)
        profile = make_profile([[9, 0, 0, 0], [0, 5, 1, 0], [0, 0, 0, 9]])
        indices = select(CompressKV(kernel_size=1, heads_per_layer=1, profile=profile).score(layer), 9, 8)
        assert indices[0].tolist() == [[20, *range(52, 60)]]

    def test_what_the_window_sees_in_itself_does_not_reach_its_neighbours(self) -> None:
        layer = planted([(52, 20.0), (20, 5.0)], num_kv_heads=1)
        method = CompressKV(heads_per_layer=2, profile=make_profile([[1, 1]] * 3))
        assert select(method.score(layer), 8 + 5, 8)[0, 0].tolist() == [*range(18, 23), *range(52, 60)]

    def test_layers_share_by_the_profiles_errors(self) -> None:
        errors = [0.1, 0.6, 0.3]
        method = CompressKV(profile=make_profile([[1.0, 0.0]] * 3, errors))
        assert method.layer_budgets(128, 3, 1000) == sharing.error_aware(128, 1000, errors)
        assert method.layer_budgets(128, 3, 1000) == [61, 205, 118]

    def test_a_profile_of_another_number_of_layers_is_refused(self) -> None:
        """Budgets for 3 layers would leave the sum wrong, or layers without one."""
        method = CompressKV(profile=make_profile([[1.0, 0.0]] * 3))
        with pytest.raises(ProfileError, match=r"org/model .*3 layers.*5"):
            method.layer_budgets(128, 5, 1000)

    def test_with_profile(self) -> None:
        profile = make_profile([[1.0, 0.0]] * 3)
        method = CompressKV(window_size=32, heads_per_layer=2)
        assert method.with_profile(profile) == CompressKV(window_size=32, heads_per_layer=2, profile=profile)
        assert method.profile is None

    def test_without_a_profile_the_command_is_named(self) -> None:
        with pytest.raises(ProfileError, match="'compresskv profile MODEL'"):
            CompressKV().layer_budgets(128, 3, 1000)
        with pytest.raises(ProfileError, match="'compresskv profile MODEL'"):
            CompressKV().score(planted([(9, 1.0)], num_kv_heads=1))

    def test_a_layer_that_the_profile_lacks(self) -> None:
        method = CompressKV(profile=make_profile([[1.0]] * 3))
        with pytest.raises(ProfileError, match="no layer 2"):
            method.score(planted([(9, 1.0)], num_kv_heads=1, layer_idx=2))


@pytest.mark.parametrize("name", ["snapkv", "compresskv", "cake"])
class TestEveryModel:
    """What some models have, and methods that score by attention must pass on."""

    def _method(self, name: str, num_query_heads: int) -> Method:
        method = registry.create(name, kernel_size=3)
        return method.with_profile(make_profile([[1.0] * num_query_heads] * 3)) if method.needs_profile else method

    @settings(deadline=None, max_examples=30)
    @given(layer=inputs(), data=st.data())
    def test_padding_changes_nothing(self, name: str, layer: LayerInputs, data: st.DataObject) -> None:
        method = self._method(name, layer.query_window.shape[1])
        num_tokens = layer.keys.shape[2]
        lengths = [data.draw(st.integers(8, num_tokens)) for _ in layer.keys]
        valid = torch.arange(num_tokens) >= num_tokens - torch.tensor(lengths)[:, None]
        scores = method.score(LayerInputs(3, layer.query_window, layer.keys, layer.keys, 0.5, None, valid))
        for row, length in enumerate(lengths):
            keys = layer.keys[row : row + 1, :, num_tokens - length :]
            alone = method.score(LayerInputs(3, layer.query_window[row : row + 1], keys, keys, 0.5))
            torch.testing.assert_close(scores[row : row + 1, :, num_tokens - length :], alone, atol=1e-5, rtol=1e-5)

    def test_softcap_is_used(self, name: str) -> None:
        """Without it, the one head gives token 20 all of its attention."""
        layer = planted([(20, 50.0), (40, 5.0)], num_kv_heads=1)
        capped = LayerInputs(3, layer.query_window, layer.keys, layer.keys, 1.0, softcap=1.0)
        scores = self._method(name, 2).score(capped)[0, 0]
        assert float(scores[20] / scores[40]) < 1.1


class TestPyramidKV:
    @settings(deadline=None, max_examples=20)
    @given(inputs())
    def test_scores_are_snapkvs(self, layer: LayerInputs) -> None:
        assert torch.equal(registry.create("pyramidkv").score(layer), SnapKV().score(layer))

    def test_budgets_are_a_pyramid(self) -> None:
        method = registry.create("pyramidkv", window_size=10, beta=10.0)
        assert method.layer_budgets(110, 3, 1000) == [200, 110, 20]
        assert registry.create("pyramidkv").layer_budgets(108, 3, 1000) == [203, 108, 13]


def naive_moments(layer: LayerInputs, row: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance over the window's queries of one query head's attention to each token before the window."""
    num_query_heads, window_size, _ = layer.query_window.shape[1:]
    num_kv_heads, num_tokens = layer.keys.shape[1:3]
    query = layer.query_window[row, head].double().numpy()
    keys = layer.keys[row, head // (num_query_heads // num_kv_heads)].double().numpy()
    older = num_tokens - window_size
    attention = []
    for i in range(window_size):
        weights = np.exp(layer.scaling * keys[: older + i + 1] @ query[i])
        attention.append(weights[:older] / weights.sum())
    mean = sum(attention) / window_size
    return mean, sum((weights - mean) ** 2 for weights in attention) / window_size


def naive_preference(layer: LayerInputs, row: int, tau1: float, tau2: float) -> float:
    moments = [naive_moments(layer, row, head) for head in range(layer.query_window.shape[1])]
    entropy = np.mean([-sum(p * math.log(p) for p in mean) for mean, _ in moments])
    variance = np.mean([variance.sum() for _, variance in moments])
    return float(entropy ** (1 / tau1) * variance ** (1 / tau2))


class TestCAKE:
    @settings(deadline=None, max_examples=40)
    @given(inputs(), st.sampled_from([1, 5, 7]), st.sampled_from([0.0, 1.0, 200.0]))
    def test_scores_equal_the_formula(self, layer: LayerInputs, kernel_size: int, gamma: float) -> None:
        scores = CAKE(kernel_size=kernel_size, gamma=gamma).score(layer)
        batch_size, num_query_heads, window_size, _ = layer.query_window.shape
        num_kv_heads, num_tokens = layer.keys.shape[1:3]
        groups, half, older = num_query_heads // num_kv_heads, kernel_size // 2, num_tokens - window_size
        assert scores.shape == (batch_size, num_kv_heads, num_tokens)
        assert scores.dtype == torch.float32
        for row in range(batch_size):
            for kv_head in range(num_kv_heads):
                expected = np.zeros(older)
                for head in range(kv_head * groups, (kv_head + 1) * groups):
                    mean, variance = naive_moments(layer, row, head)
                    worth = np.pad(mean + gamma * variance, half)
                    expected += [worth[j : j + kernel_size].sum() / kernel_size / groups for j in range(older)]
                np.testing.assert_allclose(scores[row, kv_head, :older].numpy(), expected, atol=1e-4, rtol=1e-4)

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.integers(1, 60), st.sampled_from([0.5, 1, 2.5]))
    def test_layers_share_in_proportion_to_their_preferences(self, seeds: list[int], mean: int, tau: float) -> None:
        method, layers, num_tokens = CAKE(window_size=8, tau1=tau, tau2=3 - tau), [], 60
        for i, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            query = (1 + 2 * i) * torch.randn(2, 4, 8, 4, generator=generator)
            keys = torch.randn(2, 2, num_tokens, 4, generator=generator)
            layers.append(LayerInputs(i, query, keys, keys, 0.5))
        shared = method.share_budgets(
            [method.observe(layer) for layer in layers], [[mean, mean]] * len(layers), [num_tokens] * 2
        )
        assert len(shared) == len(layers)
        window = min(8, mean)
        for row in range(2):
            counts = [layer_counts[row] for layer_counts in shared]
            assert sum(counts) == mean * len(layers)
            assert window <= min(counts) <= max(counts) <= num_tokens
            preferences = [naive_preference(layer, row, tau, 3 - tau) for layer in layers]
            level = (mean - window) * len(layers) / sum(preferences)
            if level * max(preferences) < num_tokens - window:  # no layer is capped by the prompt
                for count, preference in zip(counts, preferences, strict=True):
                    assert abs(count - window - level * preference) < 1.01

    def test_each_row_of_a_padded_batch_shares_its_own_budget_by_its_own_tokens(self) -> None:
        generator = torch.Generator().manual_seed(3)
        layers = [
            LayerInputs(i, (1 + i) * torch.randn(2, 4, 8, 4, generator=generator), keys, keys, 0.5)
            for i, keys in enumerate(torch.randn(3, 2, 2, 60, 4, generator=generator))
        ]
        valid = torch.arange(60) >= torch.tensor([[0], [25]])
        method = CAKE(window_size=8)
        padded = [replace(layer, valid=valid) for layer in layers]
        together = method.share_budgets([method.observe(layer) for layer in padded], [[30, 18]] * 3, [60, 35])
        short = [
            replace(layer, query_window=layer.query_window[1:], keys=layer.keys[1:, :, 25:], values=layer.keys)
            for layer in layers
        ]
        alone = method.share_budgets([method.observe(layer) for layer in short], [[18]] * 3, [35])
        assert [row[1:] for row in together] == alone
        assert [sum(column) for column in zip(*together, strict=True)] == [90, 54]
        assert len({row[0] for row in together}) > 1, "otherwise this tests nothing"

    def test_gamma_lifts_tokens_that_only_some_queries_attend_to(self) -> None:
        """Both get half of the attention: token 20 from each query, token 40 from every other one all of it."""
        layer = planted([(20, 20.0)], num_kv_heads=1)
        query = layer.query_window.clone()
        query[0, 0, ::2, 40] = 40.0
        layer = replace(layer, query_window=query)
        steady, restless = (CAKE(kernel_size=1, gamma=gamma).score(layer)[0, 0, [20, 40]] for gamma in (0.0, 200.0))
        assert float(steady[0] - steady[1]) == pytest.approx(0, abs=1e-3)
        assert float(restless[0]) == pytest.approx(float(restless[1]), rel=1e-3)
        assert float(restless[1] - steady[1]) == pytest.approx(200 * 0.25, rel=1e-3)


def naive_adakv(scores: list[list[float]], budget: int, window_size: int, guaranteed: float) -> list[list[int]]:
    """For each head, the tokens that a row keeps."""
    num_heads, num_tokens = len(scores), len(scores[0])
    if budget >= num_tokens:
        return [list(range(num_tokens))] * num_heads
    if budget <= window_size:
        return [list(range(num_tokens - budget, num_tokens))] * num_heads
    older, spare = range(num_tokens - window_size), budget - window_size
    kept = [set(range(num_tokens - window_size, num_tokens)) for _ in scores]
    contested = []
    for head, own in enumerate(scores):
        ranked = sorted(older, key=lambda token: (-own[token], token))
        sure = math.floor(guaranteed * spare)
        kept[head] |= set(ranked[:sure])
        contested += [(-own[token], head, token) for token in ranked[sure:]]
    free = (budget - window_size) * num_heads - sum(len(tokens) - window_size for tokens in kept)
    for _, head, token in sorted(contested)[:free]:
        kept[head].add(token)
    return [sorted(tokens) for tokens in kept]


class TestAdaKV:
    @settings(deadline=None, max_examples=200)
    @given(
        st.integers(1, 4),
        st.integers(2, 30),
        st.integers(1, 8),
        st.sampled_from([0.0, 0.2, 0.55, 1.0]),
        st.data(),
    )
    def test_keeps_the_best_tokens_of_all_heads_beside_each_heads_own_share(
        self, num_heads: int, num_tokens: int, window_size: int, guaranteed: float, data: st.DataObject
    ) -> None:
        values = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 3.0])  # few, so that ties are common
        head = st.lists(values, min_size=num_tokens, max_size=num_tokens)
        scores = torch.tensor(
            data.draw(st.lists(st.lists(head, min_size=num_heads, max_size=num_heads), min_size=2, max_size=2))
        )
        lengths = [data.draw(st.integers(1, num_tokens)) for _ in scores]
        budgets = [data.draw(st.integers(1, length + 2)) for length in lengths]
        method = AdaKV(window_size=window_size, guaranteed=guaranteed)
        indices = method.select(scores, [[budget] for budget in budgets], lengths)
        for row, (budget, length) in enumerate(zip(budgets, lengths, strict=True)):
            start = num_tokens - length
            kept = [[token - start for token in head if token != EMPTY_SLOT] for head in indices[row].tolist()]
            assert kept == naive_adakv(scores[row, :, start:].tolist(), budget, window_size, guaranteed)
            assert sum(map(len, kept)) == min(budget, length) * num_heads

    def test_a_head_with_nothing_to_see_keeps_its_guaranteed_fifth(self) -> None:
        scores = torch.zeros(1, 2, 60)
        scores[0, 0] = torch.linspace(2, 1, 60)
        indices = AdaKV().select(scores, [[28]], [60])
        assert (indices != EMPTY_SLOT).sum(dim=-1).tolist() == [[8 + 4 + 32, 8 + 4]]

    @settings(deadline=None, max_examples=20)
    @given(inputs())
    def test_scores_are_snapkvs(self, layer: LayerInputs) -> None:
        assert torch.equal(AdaKV().score(layer), SnapKV().score(layer))


def naive_together(layers: list[list[list[float]]], budget: int, num_sure: int) -> list[list[list[int]]]:
    """For each layer and KV head, the tokens kept: the first `num_sure` of every head's own, then the best of all."""
    kept: dict[tuple[int, int], set[int]] = {}
    contested = []
    for layer, heads in enumerate(layers):
        for head, own in enumerate(heads):
            ranked = sorted(range(len(own)), key=lambda token: (-own[token], token))
            kept[layer, head] = set(ranked[:num_sure])
            contested += [(-own[token], layer, head, token) for token in ranked[num_sure:]]
    free = budget * len(kept) - sum(map(len, kept.values()))
    for _, layer, head, token in sorted(contested)[:free]:
        kept[layer, head].add(token)
    return [[sorted(kept[layer, head]) for head in range(len(heads))] for layer, heads in enumerate(layers)]


class TestRankedTogether:
    @settings(deadline=None, max_examples=100)
    @given(st.integers(1, 3), st.integers(1, 3), st.integers(4, 20), st.integers(0, 3), st.data())
    def test_the_best_of_all_layers_and_heads_stay_and_every_heads_first(
        self, num_layers: int, num_heads: int, num_tokens: int, num_sinks: int, data: st.DataObject
    ) -> None:
        values = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])  # few, so that ties are common
        own = st.lists(values, min_size=num_tokens, max_size=num_tokens)
        heads = st.lists(own, min_size=num_heads, max_size=num_heads)
        replayed = [torch.tensor([data.draw(heads)]) for _ in range(num_layers)]
        budget = data.draw(st.integers(num_sinks + 1, num_tokens))
        states = torch.zeros(1, num_heads, num_tokens, 4)
        method = KVzip(num_sinks=num_sinks)
        layers = [LayerInputs(i, states[:, :, :0], states, states, 1.0, replayed=one) for i, one in enumerate(replayed)]
        observed = [method.observe(layer) for layer in layers]
        counts = method.share_heads(observed, [[budget]] * num_layers, [num_tokens])
        kept = [
            method.select(scores, rows, [num_tokens])[0].tolist()
            for scores, rows in zip(method.score_layers(observed), counts, strict=True)
        ]
        kept = [[[token for token in head if token != EMPTY_SLOT] for head in layer] for layer in kept]
        scores = [layer.scores[0].tolist() for layer in observed if layer.scores is not None]
        assert kept == naive_together(scores, budget, max(1, num_sinks))
        assert torch.equal(layers[0].replayed, replayed[0])  # type: ignore[arg-type]

    def test_all_of_the_budget_guaranteed_is_equal_numbers(self) -> None:
        replayed = torch.rand(1, 3, 50, generator=torch.Generator().manual_seed(1))
        states, method = torch.zeros(1, 3, 50, 4), KVzip(guaranteed=1.0)
        observed = [method.observe(LayerInputs(0, states[:, :, :0], states, states, 1.0, replayed=replayed))]
        assert method.share_heads(observed, [[20]], [50]) == [[[20, 20, 20]]]


class TestKeyDiff:
    @settings(deadline=None, max_examples=30)
    @given(inputs(), st.data())
    def test_scores_equal_the_formula_of_each_rows_own_tokens(self, layer: LayerInputs, data: st.DataObject) -> None:
        num_tokens = layer.num_tokens
        lengths = [data.draw(st.integers(1, num_tokens)) for _ in layer.keys]
        valid = torch.arange(num_tokens) >= num_tokens - torch.tensor(lengths)[:, None]
        scores = KeyDiff().score(replace(layer, valid=valid))
        for row, length in enumerate(lengths):
            for head in range(layer.num_kv_heads):
                keys = layer.keys[row, head, num_tokens - length :].double().numpy()
                units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
                mean = units.mean(axis=0)
                expected = -units @ mean / np.linalg.norm(mean)
                np.testing.assert_allclose(scores[row, head, num_tokens - length :].numpy(), expected, atol=1e-4)


class TestHeadKV:
    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(st.lists(st.integers(0, 1000), min_size=6, max_size=6), min_size=3, max_size=3),
        st.integers(1, 300),
        st.integers(1, 400),
        st.sampled_from([1.0, 1.2, 3.0]),
    )
    def test_budgets_are_exact_and_in_proportion(
        self, scores: list[list[int]], budget: int, num_tokens: int, beta: float
    ) -> None:
        semantic = [[1.0] * 6] * 3
        profile = replace(make_profile(semantic), traditional_scores=tuple(tuple(map(float, row)) for row in scores))
        counts = HeadKV(beta=beta, profile=profile).head_budgets(budget, 3, num_tokens)
        assert [len(row) for row in counts] == [2, 2, 2]
        mean = min(budget, num_tokens)
        flat = [count for row in counts for count in row]
        assert sum(flat) == mean * 6
        assert min(8, mean) <= min(flat) <= max(flat) <= num_tokens
        of_kv_heads = [sum(row[start : start + 3]) for row in scores for start in (0, 3)]  # query heads that read one
        total, spare = sum(of_kv_heads), max(0, mean - 8) * 6
        if total:
            shares = [spare * ((1 - 1 / beta) / 6 + own / total / beta) for own in of_kv_heads]
        else:
            shares = [spare / 6] * 6
        if max(shares) < num_tokens - 8:  # no head is capped by the prompt
            for count, share in zip(flat, shares, strict=True):
                assert abs(count - min(8, mean) - share) < 1 + 1e-6

    @pytest.mark.parametrize("budget", [50, 51, 1000])
    def test_a_budget_of_the_prompt_or_more_keeps_all(self, budget: int) -> None:
        profile = make_profile([[9.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
        assert HeadKV(profile=profile).head_budgets(budget, 3, 50) == [[50, 50]] * 3

    def test_a_head_above_the_prompt_keeps_the_prompt_and_the_others_more(self) -> None:
        profile = make_profile([[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        counts = HeadKV(profile=profile).head_budgets(28, 3, 50)
        assert counts[0][0] == 50
        assert sum(map(sum, counts)) == 28 * 6
        rest = [*counts[0][1:], *counts[1], *counts[2]]
        assert max(rest) - min(rest) <= 1

    def test_a_model_without_any_traditional_retrieval_head_shares_evenly(self) -> None:
        profile = replace(make_profile([[1.0, 0.0]] * 3), traditional_scores=((0.0, 0.0),) * 3)
        for beta in (1.0, 1.2):
            assert HeadKV(beta=beta, profile=profile).head_budgets(28, 3, 500) == [[28, 28]] * 3

    def test_semantic_scores_stand_in_where_a_profile_has_no_others(self) -> None:
        counts = HeadKV(beta=1, profile=make_profile([[3.0, 1.0], [2.0, 2.0], [0.0, 4.0]])).head_budgets(18, 3, 500)
        assert counts == [[8 + 15, 8 + 5], [8 + 10, 8 + 10], [8, 8 + 20]]

    def test_without_a_profile_the_command_is_named(self) -> None:
        with pytest.raises(ProfileError, match="'compresskv profile MODEL'"):
            HeadKV().head_budgets(128, 3, 1000)

    @settings(deadline=None, max_examples=20)
    @given(inputs())
    def test_scores_are_snapkvs(self, layer: LayerInputs) -> None:
        assert torch.equal(HeadKV().score(layer), SnapKV().score(layer))


class TestKNorm:
    @settings(deadline=None, max_examples=50)
    @given(inputs(), st.integers(1, 28))
    def test_keeps_the_keys_with_the_smallest_norm_of_each_head(self, layer: LayerInputs, budget: int) -> None:
        kept = select(KNorm().score(layer), budget, KNorm().window_size).tolist()
        for row, heads in enumerate(layer.keys.tolist()):
            for head, keys in enumerate(heads):
                norms = [math.sqrt(math.fsum(x * x for x in key)) for key in keys]
                smallest = sorted(range(len(keys)), key=norms.__getitem__)[:budget]
                assert kept[row][head] == sorted(smallest)

    def test_large_keys_of_half_precision_do_not_overflow(self) -> None:
        """In float16 both norms would be infinite, and the earlier token would win."""
        keys = torch.tensor([[40000.0, 40000.0], [30000.0, 30000.0]], dtype=torch.float16)[None, None]
        scores = KNorm().score(LayerInputs(0, keys[:, :, :0], keys, keys, 1.0))
        assert scores.dtype == torch.float32
        assert select(scores, 1, 0).tolist() == [[[1]]]

    def test_the_question_plays_no_part(self) -> None:
        layer = planted([(20, 5.0)], num_kv_heads=2)
        other = replace(layer, query_window=-layer.query_window)
        assert torch.equal(KNorm().score(layer), KNorm().score(other))


class TestStreamingLLM:
    @pytest.mark.parametrize("num_sinks", [0, 1, 4])
    @pytest.mark.parametrize("budget", range(1, 13))
    def test_sinks_and_the_most_recent(self, num_sinks: int, budget: int) -> None:
        keys = torch.zeros(2, 3, 12, 4)
        layer = LayerInputs(0, torch.zeros(2, 6, 0, 4), keys, keys, 1.0)
        method = registry.create("streaming_llm", num_sinks=num_sinks)
        sinks = list(range(min(num_sinks, budget)))
        expected = sinks + list(range(12 - (budget - len(sinks)), 12))
        assert select(method.score(layer), budget, method.window_size).tolist() == [[expected]] * 2

    def test_more_sinks_than_tokens(self) -> None:
        keys = torch.zeros(1, 1, 5, 4)
        scores = registry.create("streaming_llm", num_sinks=9).score(LayerInputs(0, keys, keys, keys, 1.0))
        assert select(scores, 3, 0).tolist() == [[[0, 1, 2]]]

    def test_the_sinks_of_a_padded_row_are_its_own_first_tokens(self) -> None:
        keys = torch.zeros(3, 2, 12, 4)
        lengths = [12, 9, 3]
        valid = torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]
        method = registry.create("streaming_llm")
        scores = method.score(LayerInputs(0, keys[:, :, :0], keys, keys, 1.0, None, valid))
        indices = select_rows(scores, [[6], [6], [6]], method.window_size, lengths)
        assert indices.tolist() == [[[0, 1, 2, 3, 10, 11]], [[3, 4, 5, 6, 10, 11]], [[-1, -1, -1, 9, 10, 11]]]

    def test_budgets_are_uniform(self) -> None:
        assert registry.create("streaming_llm").layer_budgets(100, 4, 1000) == [100] * 4
        assert registry.create("streaming_llm").layer_budgets(100, 4, 50) == [50] * 4


def test_full_keeps_the_whole_prompt_in_every_layer() -> None:
    assert registry.create("full").layer_budgets(3, 4, 1000) == [1000] * 4


def test_snapkv_budgets_are_uniform() -> None:
    assert SnapKV().layer_budgets(100, 4, 1000) == [100] * 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("streaming_llm", {"num_sinks": -1}, "num_sinks=-1"),
        ("streaming_llm", {"window_size": -1}, "window_size=-1"),
        ("streaming_llm", {"num_sinks": 2.5}, "num_sinks=2.5"),
        ("full", {"window_size": -1}, "window_size=-1"),
        ("snapkv", {"window_size": -1}, "window_size=-1"),
        ("snapkv", {"window_size": 0}, "window_size=0"),
        ("snapkv", {"window_size": "8"}, "window_size='8'"),
        ("snapkv", {"window_size": 8.0}, "window_size=8.0"),
        ("snapkv", {"window_size": True}, "window_size=True"),
        ("snapkv", {"window_size": None}, "window_size=None"),
        ("snapkv", {"kernel_size": 0}, "kernel_size=0"),
        ("snapkv", {"kernel_size": 4}, "kernel_size=4"),
        ("snapkv", {"kernel_size": -3}, "kernel_size=-3"),
        ("snapkv", {"kernel_size": 5.0}, "kernel_size=5.0"),
        ("pyramidkv", {"window_size": 0}, "window_size=0"),
        ("pyramidkv", {"beta": 0.5}, "beta=0.5"),
        ("pyramidkv", {"beta": math.nan}, "beta=nan"),
        ("pyramidkv", {"beta": math.inf}, "beta=inf"),
        ("pyramidkv", {"beta": "20"}, "beta='20'"),
        ("compresskv", {"window_size": 0}, "window_size=0"),
        ("compresskv", {"kernel_size": 2}, "kernel_size=2"),
        ("compresskv", {"heads_per_layer": 0}, "heads_per_layer=0"),
        ("compresskv", {"heads_per_layer": 1.5}, "heads_per_layer=1.5"),
        ("adakv", {"guaranteed": -0.1}, "guaranteed=-0.1"),
        ("adakv", {"guaranteed": 1.1}, "guaranteed=1.1"),
        ("adakv", {"window_size": 0}, "window_size=0"),
        ("headkv", {"beta": 0.9}, "beta=0.9"),
        ("headkv", {"window_size": 0}, "window_size=0"),
        ("cake", {"gamma": -1.0}, "gamma=-1.0"),
        ("cake", {"tau1": 0.0}, "tau1=0.0"),
        ("cake", {"tau2": -1.0}, "tau2=-1.0"),
        ("cake", {"window_size": 0}, "window_size=0"),
        ("knorm", {"window_size": -1}, "window_size=-1"),
    ],
)
def test_an_option_that_cannot_work_is_named_with_its_value(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.create(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("streaming_llm", {"num_sinks": 0}),
        ("streaming_llm", {"window_size": 8}),
        ("snapkv", {"window_size": 1, "kernel_size": 1}),
        ("pyramidkv", {"beta": 1}),
        ("compresskv", {"heads_per_layer": 100}),
        ("adakv", {"guaranteed": 0}),
        ("adakv", {"guaranteed": 1}),
        ("headkv", {"beta": 1}),
        ("cake", {"gamma": 0}),
        ("knorm", {"window_size": 8}),
    ],
)
def test_options_at_the_edge_are_taken(name: str, options: dict[str, Any]) -> None:
    method = registry.create(name, **options)
    assert {option: getattr(method, option) for option in options} == options


def test_only_methods_that_need_a_profile_take_one() -> None:
    for name, method in registry.methods().items():
        if not method.needs_profile:
            with pytest.raises(ConfigError, match=f"{name!r} takes no profile"):
                registry.create(name).with_profile(make_profile([[1.0]] * 3))


def test_methods_cannot_be_changed() -> None:
    method: Method = SnapKV()
    with pytest.raises(AttributeError):
        method.window_size = 4  # type: ignore[misc]
