"""Reading on from a cache that something else cut: no kvpress is needed for that."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compresskv.models.decoding import prefill
from compresskv.peers.press_cache import PressCache
from tiny import random_tokens, tiny_model

PROMPT, MORE = random_tokens(30), random_tokens(7, seed=1)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def cut(model: PreTrainedModel, *kept: int) -> PressCache:
    """The prompt's cache, of which each layer keeps its last so many tokens."""
    cache = DynamicCache()
    logits = prefill(model, PROMPT, cache)
    for layer, count in zip(cache.layers, kept, strict=True):
        layer.keys, layer.values = (states[:, :, -count:].clone() for states in (layer.keys, layer.values))
    return PressCache(model, cache, 30, 30, logits, 0.0, 0.0)


def masked_logits(model: PreTrainedModel, kept: int) -> Tensor:
    """What a full cache predicts whose first tokens nothing after the prompt may see."""
    cache = DynamicCache()
    prefill(model, PROMPT, cache)
    mask = torch.ones(7, 37, dtype=torch.bool).tril(30)
    mask[:, : 30 - kept] = False
    with torch.no_grad():
        logits: Tensor = model(MORE, past_key_values=cache, attention_mask=mask[None, None]).logits[0]
    return logits


def test_positions_are_those_of_the_whole_prompt(model: PreTrainedModel) -> None:
    cache = cut(model, 9, 9, 9, 9)

    torch.testing.assert_close(cache.read(MORE), masked_logits(model, 9))
    assert cache.next_position == 37


def test_layers_of_unequal_length_are_read_one_token_at_a_time(model: PreTrainedModel) -> None:
    together, apart = cut(model, 20, 9, 30, 9), cut(model, 20, 9, 30, 9)

    expected = torch.cat([apart.read(token) for token in MORE.split(1, dim=1)])

    torch.testing.assert_close(together.read(MORE), expected)


def failing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Stores the tokens, and then fails where there are several, as a press's search for fake keys can."""

    def read(input_ids: Tensor, last_only: bool) -> Tensor:
        logits = forward(input_ids, last_only)
        if input_ids.shape[1] > 1:
            raise ValueError("Could not find fake keys")
        return logits

    return read


def test_a_pass_that_fails_is_read_again_one_token_at_a_time(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cut(model, 9, 9, 9, 9)
    monkeypatch.setattr(cache, "_forward", failing(cache._forward))

    torch.testing.assert_close(cache.read(MORE), masked_logits(model, 9))
    assert (cache.lengths, cache.next_position) == ([16] * 4, 37)


def test_teacher_forcing_leaves_the_cache_as_it_was(model: PreTrainedModel) -> None:
    cache, answer = cut(model, 9, 9, 9, 9), MORE[0].tolist()

    logits = cache.teacher_forced(answer)

    torch.testing.assert_close(logits, masked_logits(model, 9)[:-1])
    assert cache.decode(set(), 6) == cut(model, 9, 9, 9, 9).decode(set(), 6)


def test_masked_tokens_are_held_but_not_retained(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[Any] = [SimpleNamespace(masked_key_indices=(torch.zeros(10),) * 3)] * 4
    monkeypatch.setattr(model, "modules", lambda: modules)

    cache = cut(model, 30, 30, 30, 30)

    assert (cache.held_tokens, cache.retained_tokens) == (30, 30 - 10 / 2)  # 2 KV heads
    assert cache.nbytes == cache.nbytes_full == 30 * 4 * 2 * 2 * 8 * 4


def test_views_count_as_the_storage_that_they_keep(model: PreTrainedModel) -> None:
    owned = cut(model, 9, 9, 9, 9)
    for layer in owned.cache.layers:
        layer.keys, layer.values = (states[:, :, :4] for states in (layer.keys, layer.values))
    viewed = PressCache(model, owned.cache, 30, 30, owned.logits, 0.0, 0.0)

    assert (viewed.held_tokens, viewed.nbytes) == (4, owned.nbytes)
