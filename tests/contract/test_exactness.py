"""After eviction, every logit is that of the full cache with the evicted entries masked out."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import compresskv
import tiny
from compresskv import CacheStateError
from compresskv.cache.stores import packed, retain
from compresskv.cache.stores.base import Store
from compresskv.cache.stores.positions import Positions
from compresskv.cache.stores.ragged import RaggedStore
from compresskv.methods.inputs import LayerInputs
from compresskv.methods.snapkv import SnapKV
from compresskv.models.shape import compressible_layers
from compresskv.selection.budgets import Budget
from compresskv.selection.scores import window_attention
from compresskv.selection.select import select_rows
from oracle import Evictions, evictions, oracle_logits
from reference_store import ReferenceStore
from rounding_store import assert_as_rounded, rounding

NUM_PROMPT = 96
# one-token decoding, a second question of 7 tokens, decoding again
STEPS = [NUM_PROMPT, 1, 1, 1, 1, 7, 1, 1, 1]
UNEQUAL = [NUM_PROMPT + 10, 9, 40, 24, 12, 30]  # the first layer keeps everything
OTHER_MODELS = ["llama_mha eager", "llama_mha sdpa", "gemma2 eager", "gpt2 eager", "gpt2 sdpa", "gpt_oss eager"]


def run(
    family: str,
    attn_implementation: str,
    method: str,
    budget: Budget,
    sequence: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Evictions]:
    model = tiny.tiny_model(family, attn_implementation)
    if not isinstance(budget, (int, float)):
        budget = budget[: len(compressible_layers(model))]
    with compresskv.compressing(model, method, budget, **tiny.options_for(model, method), **options) as cache:
        logits = tiny.read(model, cache, sequence, STEPS, attention_mask)
    return logits[:, NUM_PROMPT - 1 :], evictions(cache)


def assert_exact(family: str, logits: Tensor, evicted: Evictions, sequence: Tensor, mask: Tensor | None = None) -> None:
    expected = oracle_logits(family, sequence, evicted, mask)[:, NUM_PROMPT - 1 :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [24, 0.4, UNEQUAL], ids=["tokens", "fraction", "per_layer"])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_the_full_cache_with_evicted_tokens_masked(
    family: str, attn_implementation: str, method: str, budget: Budget
) -> None:
    sequence = tiny.random_tokens(sum(STEPS), batch_size=2)
    logits, evicted = run(family, attn_implementation, method, budget, sequence)
    assert bool(evicted) == (method != "full")
    assert_exact(family, logits, evicted, sequence)


@pytest.mark.stores("ragged", reason="sinks are weights of all heads at once, which the naive store cannot use")
@pytest.mark.parametrize("method", ["snapkv", "adakv", "compresskv"])
@pytest.mark.parametrize("model", OTHER_MODELS)
def test_logits_are_exact_without_grouped_queries_and_with_softcap_sinks_and_learned_positions(
    model: str, method: str
) -> None:
    family, attn_implementation = model.split()
    sequence = tiny.random_tokens(sum(STEPS), batch_size=2)
    logits, evicted = run(family, attn_implementation, method, UNEQUAL, sequence)
    assert evicted
    assert_exact(family, logits, evicted, sequence)


# A row shorter than its budget, unused slots, and a second question: the mask has to be right for all of them at once.
@pytest.mark.parametrize("budget", [24, 0.4, UNEQUAL], ids=["tokens", "fraction", "per_layer"])
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logits_are_exact_in_left_padded_batches(
    family: str, attn_implementation: str, method: str, budget: Budget
) -> None:
    lengths = [NUM_PROMPT, 50, 20, 6]
    prompt, prompt_mask = tiny.left_padded([tiny.random_tokens(length, seed=length) for length in lengths])
    more = tiny.random_tokens(sum(STEPS) - NUM_PROMPT, batch_size=len(lengths))
    sequence = torch.cat([prompt, more], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(more)], dim=1)
    logits, evicted = run(family, attn_implementation, method, budget, sequence, mask)
    assert evicted
    assert_exact(family, logits, evicted, sequence, mask)


class Planned(SnapKV):
    """Keeps `COUNTS[row][KV head]` tokens, whatever the budget."""

    COUNTS: ClassVar[list[list[int]]]

    def select(self, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]) -> Tensor:
        return select_rows(scores, self.COUNTS, self.window_size, row_lengths)


# Without padding transformers builds no mask, and the unused slots of the row that keeps less would be attended to.
@pytest.mark.parametrize(
    ("counts", "ragged"),
    [
        pytest.param([[10, 30], [30, 10]], False, id="rows_differ_but_the_fullest_do_not"),
        pytest.param([[10, 10], [40, 40]], False, id="rows_differ_alone"),
        pytest.param([[10, 30], [10, 30]], True, id="heads_differ_alone"),
        pytest.param([[10, 50], [24, 9]], True, id="rows_and_heads_differ"),
        pytest.param([[NUM_PROMPT, 9], [9, 40]], True, id="one_head_keeps_all"),
        pytest.param([[1, 2], [2, 1]], False, id="fewer_than_the_window"),
    ],
)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_unused_slots_are_masked_where_nothing_is_padded(
    family: str, attn_implementation: str, counts: list[list[int]], ragged: bool
) -> None:
    method = type("PlannedCounts", (Planned,), {"COUNTS": counts})()
    model, sequence = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(sum(STEPS), batch_size=2)
    with compresskv.compressing(model, method, 24) as cache:
        logits = tiny.read(model, cache, sequence, STEPS)
    assert (tiny.kept_counts(cache) == torch.tensor(counts)).all()
    assert all(isinstance(layer.store, RaggedStore) == ragged for layer in cache.compressed_layers)
    assert_exact(family, logits[:, NUM_PROMPT - 1 :], evictions(cache), sequence)


def test_adakv_and_headkv_are_tested_with_heads_that_differ() -> None:
    sequence = tiny.random_tokens(NUM_PROMPT, batch_size=2)
    model = tiny.tiny_model("llama")
    for method in ("adakv", "headkv"):
        with compresskv.compressing(model, method, 24, **tiny.options_for(model, method)) as cache:
            tiny.read(model, cache, sequence, [NUM_PROMPT])
        counts = tiny.kept_counts(cache)
        assert (counts[..., 0] != counts[..., 1]).any()
        assert (counts[:, 0] != counts[:, 1]).any() == (method == "adakv")


# What a layer's store is must make no difference: here every cut is held by one that was not made for it.
@pytest.mark.parametrize("store", [RaggedStore, ReferenceStore])
@pytest.mark.parametrize("method", ["snapkv", "adakv", "compresskv"])
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logits_are_exact_in_every_store(
    family: str, attn_implementation: str, method: str, store: type[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retain, "STORES", [store])
    prompt, prompt_mask = tiny.left_padded([tiny.random_tokens(length, seed=length) for length in (NUM_PROMPT, 50)])
    more = tiny.random_tokens(sum(STEPS) - NUM_PROMPT, batch_size=2)
    sequence, mask = torch.cat([prompt, more], dim=1), torch.cat([prompt_mask, torch.ones_like(more)], dim=1)
    logits, evicted = run(family, attn_implementation, method, 24, sequence, mask)
    assert evicted
    assert_exact(family, logits, evicted, sequence, mask)


# The same with every number rounded by hand: the oracle above knows nothing of bits. Tails are short, so that what
# comes later is packed too.
@pytest.mark.parametrize("budget", [24, 0.4, UNEQUAL, 1.0], ids=["tokens", "fraction", "per_layer", "all"])
@pytest.mark.parametrize("name", tiny.PACKED_STORES)
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "compresskv", "blend"])
@pytest.mark.parametrize("model", ["llama sdpa", "gemma3 eager", "gemma2 eager", "llama_mha sdpa", "qwen3 sdpa"])
def test_logits_of_packed_stores_are_those_of_rounded_entries(
    model: str, method: str, name: str, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)
    prompt, prompt_mask = tiny.left_padded([tiny.random_tokens(length, seed=length) for length in (NUM_PROMPT, 50)])
    more = tiny.random_tokens(sum(STEPS) - NUM_PROMPT, batch_size=2)
    sequence, mask = torch.cat([prompt, more], dim=1), torch.cat([prompt_mask, torch.ones_like(more)], dim=1)
    arguments = (*model.split(), method, budget, sequence, mask)
    logits, evicted = run(*arguments, store=name)
    exact, _ = run(*arguments)
    monkeypatch.setitem(retain.PACKED_STORES, name, rounding(name))
    expected, in_reference = run(*arguments, store=name)
    assert evicted.keys() == in_reference.keys() == set(compressible_layers(tiny.tiny_model(*model.split())))
    assert torch.equal(logits[:, 0], exact[:, 0]), "the prompt's last logits come before anything is packed"
    assert_as_rounded(logits[:, 1:], expected[:, 1:], exact[:, 1:])


# Sinks are weights of all heads at once, which the naive store cannot use.
@pytest.mark.parametrize("name", tiny.PACKED_STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_packed_stores_with_sinks(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, kind = tiny.random_tokens(sum(STEPS), batch_size=2), retain.PACKED_STORES[name]
    logits, _ = run("gpt_oss", "eager", method, 24, sequence, store=name)

    class Unpacked(RaggedStore):
        precision = kind.precision

        @classmethod
        def gathered(cls, source: Store, held: Positions, slots: Tensor) -> RaggedStore:
            heads = kind.gathered(source, held, slots).heads()
            return RaggedStore([[states[side][:, 0] for states in heads] for side in (0, 1)], held)

    monkeypatch.setitem(retain.PACKED_STORES, name, Unpacked)
    expected, _ = run("gpt_oss", "eager", method, 24, sequence, store=name)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("store", [None, RaggedStore, ReferenceStore])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_was_kept_can_be_evicted_later(
    family: str, method: str, store: type[Store] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store is not None:
        monkeypatch.setattr(retain, "STORES", [store])
    model, sequence, phases = tiny.tiny_model(family), tiny.random_tokens(sum(STEPS), batch_size=2), []
    logits = []
    with compresskv.compressing(model, method, 24, **tiny.options_for(model, method)) as cache:
        for steps in (STEPS[:4], STEPS[4:7], STEPS[7:]):
            logits.append(tiny.read(model, cache, sequence, steps))
            phases.append(evictions(cache))
            before = cache.nbytes
            for layer in cache.compressed_layers:
                assert layer.store is not None
                layer.retain(layer.store.positions[..., 1::2])
            assert store is ReferenceStore or cache.nbytes < before
    assert all(phases[1:])
    expected = oracle_logits(family, sequence, phases[0], None, *phases[1:])
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=0)
    with pytest.raises(CacheStateError, match="some of its first"):
        cache.crop(-1)


# Beside padding, only this tells whether a column of the mask belongs to the token that is kept there.
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
def test_a_later_mask_may_hide_prompt_tokens(attn_implementation: str, method: str) -> None:
    model = tiny.tiny_model("llama", attn_implementation)
    sequence = tiny.random_tokens(NUM_PROMPT + 8, batch_size=2)
    mask = torch.ones_like(sequence)
    with (
        compresskv.compressing(model, method, UNEQUAL[:4], **tiny.options_for(model, method)) as cache,
        torch.no_grad(),
    ):
        tiny.read(model, cache, sequence, [NUM_PROMPT])
        mask[:, 10:30] = mask[:, -20:-12] = 0
        positions = torch.arange(NUM_PROMPT, NUM_PROMPT + 8)[None]
        later = model(sequence[:, NUM_PROMPT:], attention_mask=mask, position_ids=positions, past_key_values=cache)
    hidden = mask[:, None, :NUM_PROMPT] == 0
    evicted = evictions(cache)
    blocked = {layer.layer_idx: hidden | evicted.get(layer.layer_idx, hidden) for layer in cache.compressed_layers}
    expected = oracle_logits("llama", sequence, blocked)[:, NUM_PROMPT:]
    torch.testing.assert_close(later.logits, expected, atol=1e-4, rtol=0)


# The queries, scaling, softcap and padding that a method is given: the wrong ones choose plausible but other tokens.
@pytest.mark.parametrize("steps", [[NUM_PROMPT], [60, 33, 3]], ids=["at_once", "in_chunks"])
@pytest.mark.parametrize("model", [f"{family} sdpa" for family in tiny.FAMILIES] + OTHER_MODELS)
def test_methods_are_given_the_models_own_attention_of_the_window(model: str, steps: list[int]) -> None:
    family, attn_implementation = model.split()
    seen: dict[int, Tensor] = {}

    class Recording(SnapKV):
        def score(self, inputs: LayerInputs) -> Tensor:
            seen[inputs.layer_idx] = window_attention(
                inputs.query_window,
                inputs.keys,
                scaling=inputs.scaling,
                softcap=inputs.softcap,
                valid=inputs.valid,
                sinks=inputs.sinks,
            )
            return super().score(inputs)

    prompt, mask = tiny.left_padded([tiny.random_tokens(length, seed=length) for length in (NUM_PROMPT, 40)])
    compressed = tiny.tiny_model(family, attn_implementation)
    with compresskv.compressing(compressed, Recording(window_size=8), 24, prompt_tokens=NUM_PROMPT) as cache:
        tiny.read(compressed, cache, prompt, steps, mask)
    assert list(seen) == compressible_layers(compressed)
    with torch.no_grad():
        output = tiny.tiny_model(family, "eager")(
            prompt, attention_mask=mask, position_ids=tiny.position_ids(mask), use_cache=False, output_attentions=True
        )
    for layer_idx, attention in seen.items():
        torch.testing.assert_close(attention, output.attentions[layer_idx][:, :, -8:], atol=1e-5, rtol=0)


def nothing_evicted(evicted: Evictions) -> Evictions:
    return {}


def heads_swapped(evicted: Evictions) -> Evictions:
    return {layer: blocked.flip(1) for layer, blocked in evicted.items()}


def layers_rotated(evicted: Evictions) -> Evictions:
    layers = list(evicted)
    return {layer: evicted[other] for layer, other in zip(layers, layers[1:] + layers[:1], strict=True)}


def one_token_beside(evicted: Evictions) -> Evictions:
    return {layer: blocked.roll(1, dims=-1) for layer, blocked in evicted.items()}


# Negative controls: were attention flat, the tests above would pass whatever the cache kept.
@pytest.mark.parametrize("wrong", [nothing_evicted, heads_swapped, layers_rotated, one_token_beside])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_reference_notices_wrong_evictions(family: str, wrong: Callable[[Evictions], Evictions]) -> None:
    sequence = tiny.random_tokens(sum(STEPS), batch_size=2)
    logits, evicted = run(family, "sdpa", "snapkv", 24, sequence)
    off = (oracle_logits(family, sequence, wrong(evicted))[:, NUM_PROMPT - 1 :] - logits).abs().amax(dim=(0, 2))
    assert off[0] < 1e-4, "the prompt's last logits come before eviction"
    assert off[1:].min() > 0.05, "every later logit depends on what is kept"
