"""Rotary position embeddings taken from models, undone and done again; and what is expected of queries to come."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tiny
from compresskv.methods import registry
from compresskv.methods.compactor import Compactor
from compresskv.methods.expected_attention import ExpectedAttention
from compresskv.methods.inputs import LayerInputs
from compresskv.models.rotary import Rotations, rotation_of
from compresskv.models.shape import compressible_layers
from compresskv.selection.rotation import Rotation

NUM_TOKENS = 40


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama_mha"])
def test_keys_of_equal_tokens_are_equal_once_they_are_turned_back(family: str) -> None:
    """Where all tokens are one, nothing but its position tells a key from another, in any layer."""
    model = tiny.tiny_model(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((1, NUM_TOKENS), 7), past_key_values=cache, use_cache=True)
    for layer in compressible_layers(model):
        keys, positions = cache.layers[layer].keys, torch.arange(NUM_TOKENS)
        rotation = Rotations(model).of(layer, NUM_TOKENS, keys.device)
        assert rotation is not None
        assert (keys[:, :, 0] - keys[:, :, -1]).norm() > 0.1 * keys[:, :, 0].norm()
        back = rotation.undone(keys, positions)
        torch.testing.assert_close(back, keys[:, :, :1].expand_as(keys), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(rotation.turned(back, positions), keys, atol=1e-4, rtol=1e-3)


def test_a_model_without_rotary_embeddings_has_none() -> None:
    assert rotation_of(tiny.tiny_model("gpt2"), 0, torch.arange(NUM_TOKENS)) is None


def some_rotation(num_positions: int, head_dim: int) -> Rotation:
    """The last two dimensions do not turn."""
    half = head_dim // 2 - 1
    angles = torch.arange(num_positions)[:, None] * 0.3 ** torch.arange(half)
    still = torch.zeros(num_positions, 2)
    pairs = [*range(half, 2 * half), *range(half), 2 * half, 2 * half + 1]
    signs = [-1.0] * half + [1.0] * half + [0.0] * 2
    cos, sin = (
        torch.cat([table, table, last], 1) for table, last in ((angles.cos(), still + 1), (angles.sin(), still))
    )
    return Rotation(cos, sin, torch.tensor(pairs), torch.tensor(signs))


def test_the_mean_matrix_is_the_mean_of_the_turns() -> None:
    rotation = some_rotation(20, 8)
    state, positions = torch.randn(8, generator=torch.Generator().manual_seed(0)), torch.arange(5, 20)
    turned = rotation.turned(state.expand(15, 8), positions).mean(dim=0)
    torch.testing.assert_close(state @ rotation.mean_matrix(positions), turned)


def naive_expected(layer: LayerInputs, row: int, start: int, head: int, num_sinks: int, num_future: int) -> np.ndarray:
    """Of one query head: the softmax over tokens behind the sinks of the mean logit and half of its variance."""
    groups = layer.query_window.shape[1] // layer.num_kv_heads
    keys, query = layer.keys[row, head // groups, start:], layer.query_window[row, head, start:]
    rotation, length = layer.rotation, len(keys)
    if rotation is None:
        before, turns = query, torch.eye(query.shape[-1])
    else:
        before = torch.stack([rotation.undone(one, torch.tensor(at)) for at, one in enumerate(query)])
        unit = torch.eye(query.shape[-1])
        turns = torch.stack([rotation.turned(unit, torch.tensor(length + at)) for at in range(num_future)]).mean(dim=0)
    kept = (before[num_sinks:] @ turns).double().numpy()
    logits = kept.mean(axis=0) @ keys.double().numpy().T * layer.scaling
    covariance = np.cov(kept.T, bias=True)
    logits += np.array([key @ covariance @ key for key in keys.double().numpy()]) * layer.scaling**2 / 2
    weights = np.exp(logits[num_sinks:] - logits[num_sinks:].max())
    return np.concatenate([np.zeros(num_sinks), weights / weights.sum()])


def defended(largest: np.ndarray) -> np.ndarray:
    """No less than the mean."""
    return np.maximum(largest, largest.mean())


@pytest.mark.parametrize("defensive", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_expected_attention_equals_its_formula_in_padded_rows_too(rotated: bool, defensive: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (
        torch.randn(2, heads, NUM_TOKENS, 8, generator=generator) * scale
        for heads, scale in ((4, 2.0), (2, 1.0), (2, 1.0))
    )
    starts = [0, 9]
    valid = torch.arange(NUM_TOKENS) >= torch.tensor(starts)[:, None]
    rotation = some_rotation(NUM_TOKENS + 30, 8) if rotated else None
    layer = LayerInputs(0, query, keys, values, 8**-0.5, valid=valid, rotation=rotation)
    method = ExpectedAttention(num_future=30, num_sinks=3, defensive=defensive)
    scores = method.score(layer)
    for row, start in enumerate(starts):
        assert torch.isinf(scores[row, :, start : start + 3]).all()
        for kv_head in range(2):
            heads = [naive_expected(layer, row, start, head, 3, 30) for head in (2 * kv_head, 2 * kv_head + 1)]
            of_group = np.mean(heads, axis=0)[3:] if not defensive else defended(np.max(heads, axis=0)[3:])
            expected = of_group * values[row, kv_head, start + 3 :].norm(dim=-1).double().numpy()
            np.testing.assert_allclose(scores[row, kv_head, start + 3 :].numpy(), expected, rtol=1e-4, atol=1e-6)
    alone = replace(layer, query_window=query[1:, :, 9:], keys=keys[1:, :, 9:], values=values[1:, :, 9:], valid=None)
    torch.testing.assert_close(method.score(alone)[0], scores[1, :, 9:])
    assert math.isfinite(float(scores[0, :, 3:].sum()))


@pytest.mark.parametrize("defensive", [False, True])
def test_a_prompt_of_sinks_alone_has_scores(defensive: bool) -> None:
    states: Tensor = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    scores = ExpectedAttention(defensive=defensive).score(LayerInputs(0, states, states, states, 1.0))
    assert torch.isinf(scores).all()


def naive_compactor(layer: LayerInputs, row: int, start: int, chunk_size: int, defensive: bool) -> np.ndarray:
    """(H_kv, length), with exact leverage: the sketch of as many dimensions as keys have only turns them."""
    num_kv_heads, groups = layer.num_kv_heads, layer.query_window.shape[1] // layer.num_kv_heads
    keys, values = (states[row, :, start:].double().numpy() for states in (layer.keys, layer.values))
    queries, length = layer.query_window[row, :, start:].double().numpy(), layer.num_tokens - start
    leverage, attention = np.zeros((num_kv_heads, length)), np.zeros((num_kv_heads, length + 2))
    for head in range(num_kv_heads):
        own = torch.from_numpy(keys[head]).float()
        if layer.rotation is not None:
            own = layer.rotation.undone(own, torch.arange(length))
        centred = own.double().numpy() - own.double().numpy().mean(axis=0)
        leverage[head] = np.diag(centred @ np.linalg.pinv(centred))
        for query in queries[head * groups : (head + 1) * groups]:
            for first in range(0, length, chunk_size):
                logits = query[first : first + chunk_size] @ keys[head, first : first + chunk_size].T * layer.scaling
                weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                own = attention[head, 1 + first : 1 + first + weights.shape[1]]
                own[:] = np.maximum(own, weights.max(axis=0)) if defensive else own + weights.sum(axis=0) / groups
        if defensive:
            attention[head, 1:-1] = defended(attention[head, 1:-1])
        attention[head, 1:-1] *= np.linalg.norm(values[head], axis=1)
    attention = (attention[:, :-2] + attention[:, 1:-1] + attention[:, 2:]) / 3
    return 0.35 * (leverage - leverage.mean()) / leverage.std() + (attention - attention.mean()) / attention.std()


@pytest.mark.parametrize("defensive", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_compactor_equals_its_formula_in_padded_rows_too(rotated: bool, defensive: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    query, keys, values = (torch.randn(2, heads, NUM_TOKENS, 8, generator=generator) for heads in (4, 2, 2))
    starts = [0, 9]
    valid = torch.arange(NUM_TOKENS) >= torch.tensor(starts)[:, None]
    rotation = some_rotation(NUM_TOKENS, 8) if rotated else None
    layer = LayerInputs(0, query, 30 * keys, values, 0.02, valid=valid, rotation=rotation)
    scores = Compactor(num_sinks=2, chunk_size=16, sketch_size=8, defensive=defensive).score(layer)
    for row, start in enumerate(starts):
        expected = naive_compactor(layer, row, start, 16, defensive)
        np.testing.assert_allclose(scores[row, :, start + 2 :].numpy(), expected[:, 2:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["forecast", "expected_attention", "compactor"])
def test_a_part_of_a_document_is_scored_as_it_would_be_at_its_beginning(name: str) -> None:
    generator, rotation = torch.Generator().manual_seed(6), some_rotation(NUM_TOKENS + 700, 8)
    query, keys, values = (torch.randn(1, heads, NUM_TOKENS, 8, generator=generator) for heads in (4, 2, 2))
    options = {"profile": tiny.random_profile(tiny.tiny_model("llama"))} if name == "forecast" else {}
    method = registry.create(name, **options)
    scores = []
    for first in (0, 50):
        positions = torch.arange(NUM_TOKENS) + first
        turned = [rotation.turned(states, positions) for states in (query, keys)]
        layer = LayerInputs(0, *turned, values, 8**-0.5, rotation=rotation, first_position=first)
        scores.append(method.score(layer))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=1e-3)
