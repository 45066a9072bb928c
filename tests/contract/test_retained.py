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
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.stores import packed
from compresskv.cache.stores.base import ROOM
from compresskv.methods.snapkv import SnapKV
from compresskv.selection.budgets import Budget
from made import Made, storage_of

NUM_PROMPT = 110
BUDGETS = [1, 6, 24, 70, 0.4, 0.85]


def read_prompt(family: str, method: str, budget: Budget, batch_size: int = 2, **options: Any) -> CompressedCache:
    model = tiny.tiny_model(family)
    options |= tiny.options_for(model, method)
    with compresskv.compressing(model, method, budget, **options) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT, batch_size), [NUM_PROMPT])
    return cache


def states(layer: CompressedLayer) -> list[Tensor]:
    """Keys and values: (B, H_kv, R, D) each or, where KV heads differ, (B, sum of R_h, D)."""
    tensors = [tensor for tensor in layer.tensors if tensor is not None]
    assert len(tensors) == len(layer.tensors) == 2
    return tensors


def stored_counts(cache: CompressedCache) -> Tensor:
    """(layers, KV heads): prompt tokens that must be in memory, those of the row that keeps the most."""
    return tiny.kept_counts(cache).amax(dim=1)


def assert_storage_is_exact(layer: CompressedLayer, counts: list[int], room: int) -> None:
    """Memory for `counts` tokens of each KV head, and for as many as `room` more of each once tokens were generated."""
    for tensor in states(layer):
        batch_size, head_dim = tensor.shape[0], tensor.shape[-1]
        slots = tensor.untyped_storage().nbytes() / (batch_size * head_dim * tensor.element_size())
        assert sum(counts) <= slots <= sum(counts) + room * len(counts)
    assert len({tensor.untyped_storage().data_ptr() for tensor in states(layer)}) == 2


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts_over_layers_and_heads_sum_to_exactly_the_budget(family: str, method: str, budget: Budget) -> None:
    cache = read_prompt(family, method, budget)
    counts = tiny.kept_counts(cache)
    # Rounded half up; Python's round() would round half to even.
    mean = budget if isinstance(budget, int) else math.floor(budget * NUM_PROMPT + 0.5)
    expected = NUM_PROMPT if method == "full" else mean
    assert (counts.sum(dim=(0, 2)) == expected * counts[:, 0].numel()).all(), "of every row"
    layers = cache.compressed_layers
    assert [layer.mean_retained for layer in layers] == pytest.approx(counts.float().mean(dim=(1, 2)).tolist())
    assert [layer.num_retained for layer in layers] == stored_counts(cache).float().mean(dim=1).tolist()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_positions_ascend_lie_in_the_prompt_and_end_with_the_window(family: str, method: str, budget: Budget) -> None:
    cache = read_prompt(family, method, budget)
    evicting = [layer for layer in cache.compressed_layers if layer.positions is not None]
    assert evicting
    mean = budget if isinstance(budget, int) else math.floor(budget * NUM_PROMPT + 0.5)
    window_size = cache.method.window_at(mean)
    for layer in evicting:
        assert layer.positions is not None
        assert layer.keys is not None
        assert layer.positions.shape[0] == layer.keys.shape[0]
        assert layer.positions.shape[1] in (1, layer.keys.shape[1])
        for kept in (head for row in tiny.kept_tokens(layer) for head in row):
            assert kept == sorted(set(kept)), "ascending, hence unique"
            assert kept[0] >= 0
            num_window = min(window_size, len(kept))
            assert kept[len(kept) - num_window :] == list(range(NUM_PROMPT - num_window, NUM_PROMPT))


# Two kinds of leak: a gather that returns a view, and a fused projection (Phi-3) whose slices keep all of it alive.
@pytest.mark.stores("ragged", reason="the naive store has a tensor for each token")
@pytest.mark.parametrize("budget", [24, 0.4, NUM_PROMPT], ids=["tokens", "fraction", "whole_prompt"])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_storage_holds_the_retained_elements_and_nothing_else(family: str, method: str, budget: Budget) -> None:
    model = tiny.tiny_model(family)
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method)) as cache:
        sequence = tiny.random_tokens(NUM_PROMPT + 9, batch_size=2)
        for steps in ([NUM_PROMPT], [1, 1, 7]):
            tiny.read(model, cache, sequence, steps)
            generated = cache.get_seq_length() - NUM_PROMPT
            for layer, counts in zip(cache.compressed_layers, stored_counts(cache), strict=True):
                assert_storage_is_exact(layer, (counts + generated).tolist(), ROOM if generated else 0)


# Sliding-window layers keep a view of the last tokens, behind which transformers leaves the whole prompt in memory.
@pytest.mark.stores("ragged", reason="the naive store has a tensor for each token")
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nbytes_are_those_of_the_tokens_that_all_layers_still_need(family: str, method: str) -> None:
    cache = read_prompt(family, method, 24)
    bounded = [layer for layer in cache.layers if not isinstance(layer, CompressedLayer)]
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in bounded)
    some = states(cache.compressed_layers[0])[0]
    batch_size, head_dim = some.shape[0], some.shape[-1]
    float32 = 4
    assert cache.nbytes == expected + 2 * batch_size * head_dim * float32 * int(stored_counts(cache).sum())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_nbytes_is_what_the_prompt_would_have_taken(family: str) -> None:
    full, compressed = read_prompt(family, "snapkv", NUM_PROMPT), read_prompt(family, "adakv", 24)
    assert compressed.full_nbytes == full.full_nbytes == full.nbytes
    expected = sum(2 * tensor.nbytes for layer in full.compressed_layers for tensor in states(layer)[:1])
    assert sum(layer.full_nbytes for layer in compressed.compressed_layers) == expected


# Freed at once: when a layer is reached, the full keys and values of all layers before it must be gone, or a prompt's
# peak memory would be that of the full cache. Methods that decide together hold all of prompts as short as this, but
# cut one by one; of longer ones they hold candidates (test_candidates.py).
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layers_prompt_is_garbage_before_the_next_layer_is_reached_or_cut(
    family: str, attn_implementation: str, method: str
) -> None:
    model = tiny.tiny_model(family, attn_implementation)
    seen: list[weakref.ref[Tensor]] = []
    alive: dict[str, list[int]] = {"update": [], "retain": []}

    def watch(layer: CompressedLayer) -> None:
        update, retain = layer.update, layer.retain
        starts: list[int] = []

        def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            alive["update"].append(sum(reference() is not None for reference in seen))
            starts.append(len(seen))
            stored = update(*args, **kwargs)
            seen.extend(weakref.ref(tensor) for tensor in (*args[:2], *stored))
            return stored

        def watched_retain(indices: Tensor, scores: Tensor) -> None:
            alive["retain"].append(sum(reference() is not None for reference in seen[: starts[0]]))
            retain(indices, scores)

        layer.update = watched  # type: ignore[method-assign]
        layer.retain = watched_retain  # type: ignore[method-assign]

    with compresskv.compressing(model, method, 24, **tiny.options_for(model, method)) as cache:
        for layer in cache.compressed_layers:
            watch(layer)
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
    alive_when = alive["retain" if cache.method.decides_together else "update"]
    assert alive_when == [0] * len(cache.compressed_layers)
    assert all(reference() is None for reference in seen)


# Attention unpacks a layer for the length of a call. Of all that PyTorch makes, only what `nbytes` counts may be left
# when a step is over, and the tokens' positions, which every store holds beside it.
@pytest.mark.stores(reason="the stores that users have")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", ["never", "always"])
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "blend"])
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_between_steps_nothing_is_alive_but_what_is_counted(
    family: str, store: str, method: str, compile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)
    model, steps = tiny.tiny_model(family), [200, 1, 1, 5, 1, 1]
    options = tiny.options_for(model, method)
    with Made() as made, compresskv.compressing(model, method, 120, store=store, compile=compile, **options) as cache:
        for step in steps:
            tiny.read(model, cache, tiny.random_tokens(sum(steps)), [step])
            held = [layer.store.held for layer in cache.compressed_layers if layer.store is not None]
            chosen = {storage_of(one.chosen): one.chosen.nbytes for one in held if one.chosen is not None}
            rest = sum(made.live().values()) - cache.nbytes - sum(chosen.values())
            # where heads' parts begin and end, of a compiled step; one unpacked layer has 15,360
            assert 0 <= rest < 1200
    assert cache.num_compiled_steps == (4 if compile == "always" else 0)


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
        assert len(held) == 2 * len(cache.compressed_layers), "keys and values"


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


@pytest.mark.parametrize("store", tiny.PACKED_STORES)
def test_heads_that_keep_no_token_are_packed(store: str) -> None:
    model, tokens = tiny.tiny_model("llama"), tiny.random_tokens(60, batch_size=2)
    padding = torch.ones_like(tokens)
    padding[1, :20] = 0
    options: dict[str, Any] = {"num_sinks": 0, "guaranteed": 0.0}
    with compresskv.compressing(model, "expected_attention", 1, store=store, **options) as cache:
        model(tokens, attention_mask=padding, past_key_values=cache)
        assert int(tiny.kept_counts(cache).min()) == 0
        later = torch.cat([padding, torch.ones(2, 1, dtype=torch.int64)], dim=1)
        logits = model(tokens[:, :1], attention_mask=later, past_key_values=cache).logits
    assert logits.isfinite().all()
