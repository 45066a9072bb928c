"""How near a compressed cache stays to the full one: figures that mean what they say, and caches left as they were."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tiny
from compresskv import CompressedCache
from compresskv.attention.routing import routing
from compresskv.evaluation.fidelity import Reference, evidence_recall, fidelity, reference, teacher_forced
from compresskv.methods.prepare import prepare_method
from compresskv.models.decoding import decode
from compresskv.plans.capture import CapturedPrompt
from compresskv.selection.select import EMPTY_SLOT

NUM_PROMPT, NUM_NEW = 90, 12
PROMPT = tiny.random_tokens(NUM_PROMPT)
ENDLESS: Any = SimpleNamespace(eos_token_id=None)
"""Stands for a tokenizer without an end token."""
FAMILIES = ["llama", "qwen3", "gemma3"]
METHODS = [name for name in tiny.EVICTING_METHODS if name != "vote"]


@contextmanager
def captured(model: PreTrainedModel) -> Iterator[tuple[CapturedPrompt, int]]:
    """The prompt, and the answer's first token."""
    with routing(model):
        prompt = CapturedPrompt(model, sys.maxsize)
        yield prompt, int(prompt.read(PROMPT[0].tolist()).argmax())


def compressed(prompt: CapturedPrompt, model: PreTrainedModel, method: str, budget: int | float) -> CompressedCache:
    return prompt.compress(prepare_method(model, method, **tiny.options_for(model, method)), budget)


def step_by_step(model: PreTrainedModel, cache: Any, token_ids: Sequence[int]) -> Tensor:
    """(n - 1, vocab) log-probabilities, a token a pass."""
    sequence = torch.cat([PROMPT, torch.tensor([list(token_ids)])], dim=1)
    return tiny.read(model, cache, sequence, [1] * (len(token_ids) - 1))[0].log_softmax(-1)


class TestReference:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_is_the_plain_models_greedy_answer(self, family: str) -> None:
        model = tiny.tiny_model(family)
        plain = tiny.generate(model, PROMPT, max_new_tokens=NUM_NEW)[0].tolist()
        with captured(model) as (prompt, first):
            full = reference(model, ENDLESS, prompt.cache, first, NUM_NEW)
        assert full.token_ids == plain
        with torch.no_grad():
            logits = model(torch.cat([PROMPT, torch.tensor([plain])], dim=1)).logits[0, NUM_PROMPT:-1]
        torch.testing.assert_close(full.log_probs, logits.log_softmax(-1), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_leaves_the_cache_as_it_was(self, family: str) -> None:
        model = tiny.tiny_model(family)
        with captured(model) as (prompt, first):
            before = [(layer.keys.clone(), layer.values.clone()) for layer in prompt.cache.layers]
            once = reference(model, ENDLESS, prompt.cache, first, NUM_NEW)
            for layer, (keys, values) in zip(prompt.cache.layers, before, strict=True):
                assert torch.equal(layer.keys, keys)
                assert torch.equal(layer.values, values)
            assert prompt.cache.get_seq_length() == NUM_PROMPT
            again = reference(model, ENDLESS, prompt.cache, first, NUM_NEW)
        assert again.token_ids == once.token_ids
        assert torch.equal(again.log_probs, once.log_probs)

    def test_a_cache_of_transformers_own_is_left_as_it_was_too(self) -> None:
        model, cache = tiny.tiny_model("llama"), DynamicCache()
        first = int(tiny.read(model, cache, PROMPT, [NUM_PROMPT])[0, -1].argmax())
        reference(model, ENDLESS, cache, first, NUM_NEW)
        assert cache.get_seq_length() == NUM_PROMPT

    def test_it_stops_at_the_end_token_and_keeps_it(self) -> None:
        model = tiny.tiny_model("llama")
        plain = tiny.generate(model, PROMPT, max_new_tokens=NUM_NEW)[0].tolist()
        ends: Any = SimpleNamespace(eos_token_id=plain[3])
        with captured(model) as (prompt, first):
            full = reference(model, ends, prompt.cache, first, NUM_NEW)
        assert full.token_ids == plain[: plain.index(plain[3]) + 1]
        assert len(full.log_probs) == len(full.token_ids) - 1


class TestTeacherForced:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_pass_over_a_compressed_cache_is_what_step_by_step_gives(
        self, family: str, attn_implementation: str, method: str
    ) -> None:
        """A causal mask that is off by what was evicted would let tokens see the future."""
        model = tiny.tiny_model(family, attn_implementation)
        with captured(model) as (prompt, first):
            token_ids = [first, *tiny.random_tokens(NUM_NEW, seed=3)[0].tolist()]
            cache = compressed(prompt, model, method, 24)
            at_once = teacher_forced(model, cache, token_ids)
            assert at_once.shape == (NUM_NEW, tiny.VOCAB_SIZE)
            torch.testing.assert_close(at_once, step_by_step(model, cache, token_ids), atol=1e-4, rtol=0)


class TestFidelity:
    @pytest.mark.parametrize("budget", [NUM_PROMPT, 10_000, 1.0])
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_cache_that_keeps_all_has_lost_nothing(self, family: str, method: str, budget: int | float) -> None:
        model = tiny.tiny_model(family)
        with captured(model) as (prompt, first):
            full = reference(model, ENDLESS, prompt.cache, first, NUM_NEW)
            near = fidelity(model, compressed(prompt, model, method, budget), full)
        assert near is not None
        assert 0 <= near.kl_divergence < 1e-6
        assert near.top1_agreement == 1

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_figures_are_those_of_a_naive_loop(self, family: str, method: str) -> None:
        """In the right direction: from the full cache's distribution, in nats, over all tokens but the first."""
        model = tiny.tiny_model(family)
        with captured(model) as (prompt, first):
            full = reference(model, ENDLESS, prompt.cache, first, NUM_NEW)
            near = fidelity(model, compressed(prompt, model, method, 20), full)
            ours = step_by_step(model, compressed(prompt, model, method, 20), full.token_ids).double()
        theirs = full.log_probs.double()
        divergences = [
            sum(float(p.exp() * (p - q)) for p, q in zip(*rows, strict=True)) for rows in zip(theirs, ours, strict=True)
        ]
        same = [int(p.argmax()) == int(q.argmax()) for p, q in zip(theirs, ours, strict=True)]
        assert near is not None
        assert near.kl_divergence == pytest.approx(sum(divergences) / (NUM_NEW - 1), rel=1e-3, abs=1e-6)
        assert near.kl_divergence > 1e-3
        assert near.top1_agreement == pytest.approx(sum(same) / len(same))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_answer_after_measuring_is_the_answer_without(self, family: str, method: str) -> None:
        model = tiny.tiny_model(family)
        with captured(model) as (prompt, first):
            full = reference(model, ENDLESS, prompt.cache, first, NUM_NEW)
            measured, untouched = (compressed(prompt, model, method, 20) for _ in range(2))
            nbytes = measured.nbytes
            first_time = fidelity(model, measured, full)
            assert (measured.nbytes, measured.get_seq_length()) == (nbytes, NUM_PROMPT)
            assert fidelity(model, measured, full) == first_time
            answers = [decode(model, ENDLESS, first, cache, NUM_NEW) for cache in (measured, untouched)]
        assert answers[0] == answers[1]

    def test_an_answer_of_one_token_came_before_any_eviction(self) -> None:
        model = tiny.tiny_model("llama")
        with captured(model) as (prompt, first):
            full = reference(model, ENDLESS, prompt.cache, first, 1)
            assert full.token_ids == [first]
            assert fidelity(model, compressed(prompt, model, "knorm", 20), full) is None

    def test_rounding_never_makes_a_divergence_negative(self) -> None:
        model = tiny.tiny_model("llama")
        with captured(model) as (prompt, first):
            cache = compressed(prompt, model, "knorm", NUM_PROMPT)
            log_probs = teacher_forced(model, cache, [first, 5])
            near = fidelity(model, cache, Reference([first, 5], log_probs - 1e-5))
        assert near is not None
        assert near.kl_divergence == 0


def cache_with(*positions: list[Any] | None) -> Any:
    """A cache whose layers keep these prompt tokens: (1, H, R) each, or all."""
    layers = [SimpleNamespace(positions=None if kept is None else torch.tensor(kept)) for kept in positions]
    return SimpleNamespace(compressed_layers=layers)


class TestEvidenceRecall:
    def test_heads_that_share_a_choice(self) -> None:
        assert evidence_recall(cache_with([[[0, 4, 5, 9]]]), [slice(4, 8)]) == 0.5

    def test_heads_that_choose_for_themselves_count_alike(self) -> None:
        assert evidence_recall(cache_with([[[0, 4, 5], [4, 5, 6], [1, 2, 3]]]), [slice(4, 6)]) == pytest.approx(2 / 3)

    def test_heads_that_keep_different_numbers_have_empty_slots_that_are_no_token(self) -> None:
        ragged = [[[EMPTY_SLOT, EMPTY_SLOT, 0], [0, 1, 2]]]
        assert evidence_recall(cache_with(ragged), [slice(0, 2)]) == 0.75
        assert evidence_recall(cache_with(ragged), [slice(89, 90)]) == 0.0  # -1 is not the last token

    def test_layers_count_alike_whatever_they_keep(self) -> None:
        cache = cache_with([[[4]]], [[[4, 5, 6, 7]]], None, [[[0]]])
        assert evidence_recall(cache, [slice(4, 8)]) == pytest.approx((0.25 + 1 + 1 + 0) / 4)

    def test_all_is_kept_of_a_prompt_that_was_not_cut(self) -> None:
        assert evidence_recall(cache_with(None, None), [slice(0, 3)]) == 1.0

    def test_pieces_that_overlap_count_once(self) -> None:
        assert evidence_recall(cache_with([[[2, 3]]]), [slice(2, 4), slice(3, 6)]) == 0.5

    @pytest.mark.parametrize("evidence", [[], [slice(3, 3)]])
    def test_without_evidence_there_is_no_share(self, evidence: list[slice]) -> None:
        assert evidence_recall(cache_with([[[0]]]), evidence) is None

    @pytest.mark.parametrize("budget", [20, NUM_PROMPT])
    @pytest.mark.parametrize("method", METHODS)
    def test_of_real_caches_it_is_the_share_that_their_heads_say_they_keep(self, method: str, budget: int) -> None:
        model, evidence = tiny.tiny_model("llama"), [slice(10, 17), slice(60, 75)]
        wanted = {*range(10, 17), *range(60, 75)}
        with captured(model) as (prompt, _):
            cache = compressed(prompt, model, method, budget)
        shares = [
            len(wanted & set(head)) / len(wanted)
            for layer in cache.compressed_layers
            for head in tiny.kept_tokens(layer)[0]
        ]
        assert evidence_recall(cache, evidence) == pytest.approx(sum(shares) / len(shares))
        assert (evidence_recall(cache, evidence) == 1) == (budget == NUM_PROMPT)
