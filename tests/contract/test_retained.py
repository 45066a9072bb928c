"""How many tokens are kept, which, and that the memory of all others is really free."""

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import compresskv
import tiny
from compresskv import CompressedCache
from compresskv.budgets import Budget
from compresskv.layer import CompressedLayer
from compresskv.methods.snapkv import SnapKV

NUM_PROMPT = 110
BUDGETS = [1, 6, 24, 70, 0.4, 0.85]


def read_prompt(family: str, method: str, budget: Budget, batch_size: int = 2, **options: Any) -> CompressedCache:
    model = tiny.tiny_model(family)
    options |= tiny.options_for(model, method)
    with compresskv.compressing(model, method, budget, **options) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT, batch_size), [NUM_PROMPT])
    return cache


def num_kept(layer: CompressedLayer) -> int:
    return NUM_PROMPT if layer.positions is None else layer.positions.shape[-1]


def states(layer: CompressedLayer) -> list[Tensor]:
    assert layer.keys is not None
    assert layer.values is not None
    return [layer.keys, layer.values]


def assert_storage_is_exact(layer: CompressedLayer, num_tokens: int) -> None:
    for tensor in states(layer):
        assert tensor.shape[-2] == num_tokens
        assert tensor.untyped_storage().nbytes() == tensor.nelement() * tensor.element_size()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts_over_layers_sum_to_exactly_the_budget(family: str, method: str, budget: Budget) -> None:
    layers = read_prompt(family, method, budget).compressed_layers
    # Rounded half up; Python's round() would round half to even.
    mean = budget if isinstance(budget, int) else math.floor(budget * NUM_PROMPT + 0.5)
    expected = NUM_PROMPT if method == "full" else mean
    assert sum(map(num_kept, layers)) == expected * len(layers)
    assert [layer.num_retained for layer in layers] == list(map(num_kept, layers))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_positions_ascend_lie_in_the_prompt_and_end_with_the_window(family: str, method: str, budget: Budget) -> None:
    cache = read_prompt(family, method, budget)
    evicting = [layer for layer in cache.compressed_layers if layer.positions is not None]
    assert evicting
    for layer in evicting:
        positions, keys = layer.positions, states(layer)[0]
        assert positions is not None
        assert positions.shape[0] == keys.shape[0]
        assert positions.shape[1] in (1, keys.shape[1])
        assert (positions.diff(dim=-1) > 0).all(), "ascending, hence unique"
        assert positions.min() >= 0
        num_window = min(cache.method.window_size, positions.shape[-1])
        first = positions.shape[-1] - num_window
        assert (positions[..., first:] == torch.arange(NUM_PROMPT - num_window, NUM_PROMPT)).all()


# Two kinds of leak: a gather that returns a view, and a fused projection (Phi-3) whose slices keep all of it alive.
@pytest.mark.parametrize("budget", [24, 0.4, NUM_PROMPT], ids=["tokens", "fraction", "whole_prompt"])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_storage_holds_the_retained_elements_and_nothing_else(family: str, method: str, budget: Budget) -> None:
    model = tiny.tiny_model(family)
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method)) as cache:
        sequence = tiny.random_tokens(NUM_PROMPT + 9, batch_size=2)
        tiny.read(model, cache, sequence, [NUM_PROMPT])
        for layer in cache.compressed_layers:
            assert_storage_is_exact(layer, num_kept(layer))
        tiny.read(model, cache, sequence, [1, 1, 7])
        for layer in cache.compressed_layers:
            assert_storage_is_exact(layer, num_kept(layer) + 9)


# Sliding-window layers keep a view of the last tokens, behind which transformers leaves the whole prompt in memory.
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nbytes_are_those_of_the_tokens_that_all_layers_still_need(family: str, method: str) -> None:
    cache = read_prompt(family, method, 24)
    assert cache.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_nbytes_is_what_the_prompt_would_have_taken(family: str) -> None:
    full, compressed = (read_prompt(family, "snapkv", budget) for budget in (NUM_PROMPT, 24))
    assert compressed.full_nbytes == full.full_nbytes == full.nbytes
    expected = sum(2 * tensor.nbytes for layer in full.compressed_layers for tensor in states(layer)[:1])
    assert sum(layer.full_nbytes for layer in compressed.compressed_layers) == expected


# Freed at once: when a layer is reached, the full keys and values of all layers before it must be gone, or a prompt's
# peak memory would be that of the full cache.
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layers_prompt_is_garbage_before_the_next_layer_is_reached(
    family: str, attn_implementation: str, method: str
) -> None:
    model = tiny.tiny_model(family, attn_implementation)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(layer: CompressedLayer) -> None:
        update = layer.update

        def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            alive.append(sum(reference() is not None for reference in seen))
            stored = update(*args, **kwargs)
            seen.extend(weakref.ref(tensor) for tensor in (*args[:2], *stored))
            return stored

        layer.update = watched  # type: ignore[method-assign]

    with compresskv.compressing(model, method, 24, **tiny.options_for(model, method)) as cache:
        for layer in cache.compressed_layers:
            watch(layer)
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
    assert alive == [0] * len(cache.compressed_layers)
    assert all(reference() is None for reference in seen)


def test_a_prompt_read_in_chunks_leaves_no_queries_behind() -> None:
    # The observation window is held between chunks; as a view it would keep the queries of a whole chunk.
    model = tiny.tiny_model("llama")
    with compresskv.compressing(model, "snapkv", 24, prompt_tokens=NUM_PROMPT) as cache:
        sequence = tiny.random_tokens(NUM_PROMPT)
        tiny.read(model, cache, sequence, [60])
        held = [value for layer in cache.compressed_layers for value in vars(layer).values() if torch.is_tensor(value)]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)
        tiny.read(model, cache, sequence, [NUM_PROMPT - 60])
        held = [value for layer in cache.compressed_layers for value in vars(layer).values() if torch.is_tensor(value)]
        assert len(held) == 3 * len(cache.compressed_layers), "keys, values and positions"


def test_scoring_builds_no_graph_and_retained_tensors_need_no_gradient() -> None:
    # A user's forward pass without no_grad must not keep the whole prompt alive through autograd.
    model, under_grad = tiny.tiny_model("llama"), []

    class Watching(SnapKV):
        def score(self, inputs: Any) -> Tensor:
            under_grad.append(torch.is_grad_enabled())
            scores = super().score(inputs)
            assert not scores.requires_grad
            return scores

    with compresskv.compressing(model, Watching(), 24) as cache:
        logits = model(tiny.random_tokens(NUM_PROMPT), past_key_values=cache).logits
    assert logits.requires_grad, "otherwise this tests nothing"
    assert under_grad == [False] * len(cache.compressed_layers)
    for tensor in (tensor for layer in cache.compressed_layers for tensor in states(layer)):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
