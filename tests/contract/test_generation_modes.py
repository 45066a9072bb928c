"""`model.generate` in all its modes: with a compressed cache it gives what the masked full cache gives, or refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import BaseStreamer

import compresskv
import tiny
from compresskv import CacheStateError, CompressedCache
from compresskv.cache.stores import packed, retain
from compresskv.compression import Compressing
from oracle import evicted, evictions, oracle_model
from rounding_store import rounding

NUM_PROMPT = 70
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several_samples": {"do_sample": True, "num_return_sequences": 2},
    "several_beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled_beams": {"do_sample": True, "num_beams": 3},
    "repetition_penalty": {"repetition_penalty": 1.5},
}


def context(model: PreTrainedModel, method: str = "snapkv", budget: float = 24, **options: Any) -> Compressing:
    return compresskv.compressing(model, method, budget, **options, **tiny.options_for(model, method))


def seeded(model: PreTrainedModel, prompt: Tensor, cache: CompressedCache | None = None, **options: Any) -> list[Any]:
    torch.manual_seed(11)
    return tiny.generate(model, prompt, cache, **options).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_mode_of_generate_at_a_full_budget_equals_the_plain_one(family: str, method: str, mode: str) -> None:
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT, batch_size=2)
    with context(model, method, NUM_PROMPT) as cache:
        tokens = seeded(model, prompt, cache, **MODES[mode])
    assert tokens == seeded(model, prompt, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_mode_of_generate_at_a_small_budget_equals_the_masked_full_cache(
    family: str, method: str, mode: str
) -> None:
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT, batch_size=2)
    with context(model, method) as cache:
        tokens = seeded(model, prompt, cache, **MODES[mode])
    evictions_of_row = {}
    for layer, blocked in evictions(cache).items():
        # Beams and samples of one prompt keep the same: one row stands for all.
        groups = blocked.unflatten(0, (len(prompt), -1))
        assert (groups == groups[:, :1]).all()
        evictions_of_row[layer] = groups[:, 0]
    with evicted(evictions_of_row):
        assert tokens == seeded(oracle_model(family), prompt, use_cache=False, **MODES[mode])
    assert tokens != seeded(model, prompt, **MODES[mode]), "otherwise this tests nothing"


REARRANGEMENTS: dict[str, tuple[Any, list[int]]] = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("mode", [mode for mode in MODES if "beams" in mode])
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
@pytest.mark.parametrize("store", tiny.PACKED_STORES)
def test_beams_over_packed_entries_equal_those_over_rounded_ones(
    store: str, method: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)
    model, prompt, found = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT, batch_size=2), []
    for kind in (retain.PACKED_STORES[store], rounding(store)):
        monkeypatch.setitem(retain.PACKED_STORES, store, kind)
        with context(model, method, store=store) as cache:
            found.append(seeded(model, prompt, cache, **MODES[mode]))
    assert found[0] == found[1]


# Rows of one batch keep different tokens: positions that stay behind would mask the wrong ones in a second question.
@pytest.mark.parametrize("name", REARRANGEMENTS)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_positions_follow_their_rows(
    family: str, store: str, method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 1)
    rearrange, rows = REARRANGEMENTS[name]
    model = tiny.tiny_model(family)
    lengths = [NUM_PROMPT, 40, 55]
    prompt, prompt_mask = tiny.left_padded([tiny.random_tokens(length, seed=length) for length in lengths])
    more = tiny.random_tokens(6, batch_size=3)
    sequence, mask = torch.cat([prompt, more], dim=1), torch.cat([prompt_mask, torch.ones_like(more)], dim=1)
    with context(model, method, 0.4, store=store) as straight:
        tiny.read(model, straight, sequence, [NUM_PROMPT, 1], mask)
        expected = tiny.read(model, straight, sequence, [4, 1], mask)
    with context(model, method, 0.4, store=store) as cache:
        tiny.read(model, cache, sequence, [NUM_PROMPT, 1], mask)
        rearrange(cache)
        logits = tiny.read(model, cache, sequence[rows], [4, 1], mask[rows])
    for layer, before in zip(cache.compressed_layers, straight.compressed_layers, strict=True):
        if before.positions is None:
            assert layer.positions is None
        else:
            assert layer.positions is not None
            assert torch.equal(layer.positions, before.positions[rows])
    torch.testing.assert_close(logits, expected[rows], atol=1e-4, rtol=0)


class ListStreamer(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_streamer_gets_the_tokens_as_they_come(method: str) -> None:
    model, prompt, streamer = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT), ListStreamer()
    with context(model, method) as cache:
        tokens = tiny.generate(model, prompt, cache, streamer=streamer)
    assert streamer.tokens == prompt[0].tolist() + tokens[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_second_question_on_the_same_cache_equals_the_masked_full_cache(
    family: str, attn_implementation: str, method: str
) -> None:
    # generate is given the whole conversation and reads what the cache has not seen; nothing more is evicted.
    model, prompt = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(NUM_PROMPT)
    with context(model, method) as cache:
        first = tiny.generate(model, prompt, cache)
        positions = [layer.positions for layer in cache.compressed_layers]
        conversation = torch.cat([prompt, first, tiny.random_tokens(7, seed=9)], dim=1)
        second = tiny.generate(model, conversation, cache)
        for layer, old in zip(cache.compressed_layers, positions, strict=True):
            assert torch.equal(layer.positions, old)
    with evicted(evictions(cache)):
        assert second.tolist() == tiny.generate(oracle_model(family), conversation, use_cache=False).tolist()


@pytest.mark.parametrize("steps", [[1, 1, 5, 1], [7]], ids=["decoded", "one_question"])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_generated_tokens_can_be_cropped_for_another_question(
    family: str, store: str, method: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT)
    questions = [torch.cat([prompt, tiny.random_tokens(sum(steps), seed=seed)], dim=1) for seed in (1, 2)]
    with context(model, method, store=store) as cache:
        tiny.read(model, cache, prompt, [NUM_PROMPT])
        tiny.read(model, cache, questions[0], steps)
        cache.crop(-sum(steps))
        assert cache.get_seq_length() == NUM_PROMPT
        logits = tiny.read(model, cache, questions[1], steps)
    with context(model, method, store=store) as fresh:
        tiny.read(model, fresh, prompt, [NUM_PROMPT])
        assert torch.equal(logits, tiny.read(model, fresh, questions[1], steps))


@pytest.mark.parametrize("amount", [-3, -2, 0, NUM_PROMPT, NUM_PROMPT - 1, NUM_PROMPT - 20])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_cropping_into_or_right_after_the_prompt_is_refused_and_changes_nothing(family: str, amount: int) -> None:
    model, sequence = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT + 2)
    num_generated = 2 if amount == -3 else 0
    steps = [NUM_PROMPT] + [1] * num_generated
    with context(model) as cache:
        tiny.read(model, cache, sequence, steps)
        nbytes = cache.nbytes
        with pytest.raises(CacheStateError, match=f"prompt has {NUM_PROMPT}") as raised:
            cache.crop(amount)
        assert "\n" not in str(raised.value)
        assert cache.nbytes == nbytes
        assert cache.get_seq_length() == sum(steps)


# Assisted decoding reads drafts together with the prompt and crops the wrong ones. Whether it works must not depend on
# the drafts: it is refused, whatever the budget.
@pytest.mark.parametrize("repeats", [False, True], ids=["no_draft_at_first", "drafts_at_first"])
@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
@pytest.mark.parametrize("budget", [24, 500])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_assisted_decoding_is_refused_with_what_to_do(family: str, budget: int, how: str, repeats: bool) -> None:
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(40)
    if repeats:
        prompt = torch.cat([prompt, prompt[:, :30]], dim=1)
    options = {"prompt_lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": assistant()}}[how]
    with context(model, budget=budget) as cache:
        with pytest.raises(CacheStateError, match="Leave out assistant_model and prompt_lookup_num_tokens"):
            tiny.generate(model, prompt, cache, eos_token_id=2, **options)
        cache.reset()
        again = tiny.generate(model, prompt, cache).tolist()
    with context(model, budget=budget) as fresh:
        assert again == tiny.generate(model, prompt, fresh).tolist()


def assistant() -> PreTrainedModel:
    model = tiny.tiny_model("mistral")
    model.generation_config.max_length = None  # transformers warns where it meets max_new_tokens
    return model


def assert_same_positions(cache: CompressedCache, other: CompressedCache) -> None:
    for layer, in_other in zip(cache.compressed_layers, other.compressed_layers, strict=True):
        if in_other.positions is None:
            assert layer.positions is None
        else:
            assert layer.positions is not None
            assert torch.equal(layer.positions, in_other.positions)


# The window may lie across two chunks, or the last chunk may be shorter than it.
@pytest.mark.parametrize("steps", [[30, 30, 10], [64, 6], [69, 1], [66, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("store", ["native", "int8"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prompt_read_in_chunks_is_compressed_as_if_read_at_once(
    family: str, store: str, attn_implementation: str, method: str, steps: list[int]
) -> None:
    model, sequence = tiny.tiny_model(family, attn_implementation), tiny.random_tokens(NUM_PROMPT + 8)
    with context(model, method, store=store) as whole:
        expected = tiny.read(model, whole, sequence, [NUM_PROMPT, 1, 6, 1])
    with context(model, method, prompt_tokens=NUM_PROMPT, store=store) as cache:
        logits = tiny.read(model, cache, sequence, [*steps, 1, 6, 1])
    assert_same_positions(cache, whole)
    torch.testing.assert_close(logits, expected, atol=1e-4 if store == "native" else 0.02, rtol=0)


@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_padded_batch_read_in_chunks_is_compressed_as_if_read_at_once(method: str) -> None:
    # The first chunk is nothing but padding in the shorter row.
    model = tiny.tiny_model("llama")
    prompt, mask = tiny.left_padded([tiny.random_tokens(NUM_PROMPT), tiny.random_tokens(25, seed=1)])
    with context(model, method) as whole:
        expected = tiny.read(model, whole, prompt, [NUM_PROMPT], mask)[:, -1]
    with context(model, method, prompt_tokens=NUM_PROMPT) as cache:
        logits = tiny.read(model, cache, prompt, [30, 30, 10], mask)[:, -1]
    assert_same_positions(cache, whole)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_size", [30, 69, 200])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_generate_may_read_the_prompt_in_chunks(family: str, method: str, chunk_size: int) -> None:
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT)
    plain = tiny.generate(model, prompt, DynamicCache(config=model.config), prefill_chunk_size=chunk_size)
    if not torch.equal(plain, tiny.generate(model, prompt)):
        pytest.skip("this version's prefill_chunk_size changes the tokens of a plain cache too")
    with context(model, method) as whole:
        expected = tiny.generate(model, prompt, whole)
    with context(model, method, prompt_tokens=NUM_PROMPT) as cache:
        tokens = tiny.generate(model, prompt, cache, prefill_chunk_size=chunk_size)
    assert tokens.tolist() == expected.tolist()
    assert_same_positions(cache, whole)


# Beyond its first context length, Phi-3's generate replaces a cache that is true and shorter than that by a plain one:
# nothing would be compressed, and nobody told.
@pytest.mark.parametrize("method", tiny.METHODS)
def test_phi3_keeps_an_empty_cache_for_a_prompt_beyond_its_first_context_length(method: str) -> None:
    prompt = tiny.random_tokens(NUM_PROMPT)
    model = tiny.build_model("phi3")
    with context(model, method) as expected:
        tokens = tiny.generate(model, prompt, expected)
    model.config.original_max_position_embeddings = NUM_PROMPT - 20
    with context(model, method) as cache:
        assert tiny.generate(model, prompt, cache).tolist() == tokens.tolist()
    assert_same_positions(cache, expected)


def test_phi3_reads_everything_again_where_generation_crosses_its_first_context_length() -> None:
    # As with a plain cache: cached keys have the RoPE factors of shorter prompts.
    model, prompt = tiny.build_model("phi3"), tiny.random_tokens(NUM_PROMPT)
    model.config.original_max_position_embeddings = NUM_PROMPT + 3
    with context(model, budget=NUM_PROMPT) as cache:
        assert tiny.generate(model, prompt, cache).tolist() == tiny.generate(model, prompt).tolist()
