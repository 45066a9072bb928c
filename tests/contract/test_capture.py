"""One capture stands for any number of prefills: what is cut from it is what `compressing` would have kept."""

import sys

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compresskv
import tiny
from compresskv import CompressedCache
from compresskv.attention.routing import routing
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.models.shape import compressible_layers
from compresskv.plans.capture import CapturedPrompt
from compresskv.selection.budgets import Budget

NUM_PROMPT = 90
STEPS = [1, 1, 7, 1]
FAMILIES = ["llama", "qwen2", "gemma3"]
BUDGETS = [5, 40, 0.3, [NUM_PROMPT + 10, 9, 40, 24], NUM_PROMPT]
WINDOW = 32
SEQUENCE = tiny.random_tokens(NUM_PROMPT + sum(STEPS))


def prepared(model: PreTrainedModel, method: str) -> Method:
    chosen = prepare_method(model, method, **tiny.options_for(model, method))
    assert chosen.window_size <= WINDOW
    return chosen


def budget_for(model: PreTrainedModel, budget: Budget) -> Budget:
    return budget if isinstance(budget, (int, float)) else budget[: len(compressible_layers(model))]


def captured_prompt(
    model: PreTrainedModel, num_pieces: int = 1, num_tokens: int = NUM_PROMPT, window_size: int = sys.maxsize
) -> CapturedPrompt:
    """The start of `SEQUENCE`, read in pieces of which the last are shorter than a window."""
    captured = CapturedPrompt(model, window_size)
    ends = [num_tokens - 4 * piece for piece in range(num_pieces)][::-1]
    for start, end in zip([0, *ends], ends, strict=False):
        captured.read(SEQUENCE[0, start:end].tolist())
    return captured


def full_logits(model: PreTrainedModel, captured: CapturedPrompt) -> Tensor:
    return tiny.read(model, captured.cache.branch(), SEQUENCE, STEPS)


def assert_equal_caches(cut: CompressedCache, expected: CompressedCache) -> None:
    for layer, other in zip(cut.compressed_layers, expected.compressed_layers, strict=True):
        assert (layer.positions is None) == (other.positions is None)
        if other.positions is not None:
            assert torch.equal(layer.positions, other.positions)
        assert type(layer.store) is type(other.store)
    assert cut.get_seq_length() == expected.get_seq_length()
    assert cut.nbytes == expected.nbytes
    assert cut.full_nbytes == expected.full_nbytes


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_cut_from_a_capture_is_the_one_that_compressing_makes(
    family: str, attn_implementation: str, method: str, budget: Budget
) -> None:
    model = tiny.tiny_model(family, attn_implementation)
    chosen, budget = prepared(model, method), budget_for(model, budget)
    with compresskv.compressing(model, chosen, budget) as expected:
        prompt_logits = tiny.read(model, expected, SEQUENCE, [NUM_PROMPT])[0, -1]
        with routing(model):
            captured = CapturedPrompt(model, max(1, chosen.num_observed()))
            torch.testing.assert_close(
                captured.read(SEQUENCE[0, :NUM_PROMPT].tolist()), prompt_logits, atol=1e-5, rtol=0
            )
            cut = captured.compress(chosen, budget)
            assert_equal_caches(cut, expected)
            logits = tiny.read(model, cut, SEQUENCE, STEPS)
        torch.testing.assert_close(logits, tiny.read(model, expected, SEQUENCE, STEPS), atol=1e-5, rtol=0)
        assert_equal_caches(cut, expected)


# All are cut before the first decodes, and they decode in turns: a shared layer or mutable tensor would show.
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_cut_from_one_capture_disturb_neither_each_other_nor_the_full_cache(
    family: str, attn_implementation: str
) -> None:
    model = tiny.tiny_model(family, attn_implementation)
    jobs = [(prepared(model, method), budget_for(model, budget)) for budget in BUDGETS for method in tiny.METHODS]
    with routing(model):
        captured = captured_prompt(model)
        before, nbytes = full_logits(model, captured), [layer.keys.shape for layer in captured.cache.layers]
        caches = [captured.compress(*job) for job in jobs]
        logits = [
            torch.cat(rows, dim=1)
            for rows in zip(
                *[  # step by step through all caches
                    [tiny.read(model, cache, SEQUENCE, [num_new]) for cache in caches] for num_new in STEPS
                ],
                strict=True,
            )
        ]
        assert torch.equal(full_logits(model, captured), before)
        assert [layer.keys.shape for layer in captured.cache.layers] == nbytes
        for job, in_turns in zip(jobs, logits, strict=True):
            alone = tiny.read(model, captured_prompt(model).compress(*job), SEQUENCE, STEPS)
            assert torch.equal(in_turns, alone), f"{job[0].name} at {job[1]}"
    with torch.no_grad():
        plain = model(SEQUENCE).logits[:, NUM_PROMPT:]
    torch.testing.assert_close(before, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_pieces", [2, 3])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("attn_implementation", tiny.ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_and_then_its_question_are_captured_as_if_read_at_once(
    family: str, attn_implementation: str, method: str, num_pieces: int
) -> None:
    model = tiny.tiny_model(family, attn_implementation)
    chosen = prepared(model, method)
    with routing(model):
        at_once, in_pieces = captured_prompt(model), captured_prompt(model, num_pieces)
        assert in_pieces.input_ids == at_once.input_ids == SEQUENCE[0, :NUM_PROMPT].tolist()
        for budget in (20, 40):
            whole, pieces = at_once.compress(chosen, budget), in_pieces.compress(chosen, budget)
            assert_equal_caches(pieces, whole)
            logits = tiny.read(model, pieces, SEQUENCE, STEPS)
            torch.testing.assert_close(logits, tiny.read(model, whole, SEQUENCE, STEPS), atol=1e-4, rtol=0)


# One context serves many questions: reading one must not show in the others.
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_on_forks_of_one_context_do_not_see_each_other(family: str, method: str) -> None:
    model = tiny.tiny_model(family)
    chosen = prepared(model, method)
    questions = [tiny.random_tokens(6, seed=seed)[0].tolist() for seed in (1, 2)]
    with routing(model):
        context = captured_prompt(model)
        forks = [context.fork(), context.fork()]
        for fork, question in zip(forks, questions, strict=True):
            fork.read(question)
        assert context.input_ids == SEQUENCE[0, :NUM_PROMPT].tolist()
        for fork, question in zip(forks, questions, strict=True):
            alone = captured_prompt(model)
            alone.read(question)
            assert fork.input_ids == alone.input_ids
            assert_equal_caches(fork.compress(chosen, 40), alone.compress(chosen, 40))
            sequence = torch.cat([torch.tensor([alone.input_ids]), SEQUENCE[:, : sum(STEPS)]], dim=1)
            logits = [tiny.read(model, prompt.compress(chosen, 40), sequence, STEPS) for prompt in (fork, alone)]
            assert torch.equal(*logits)


# The capture's window is the largest of all methods': a prompt may be shorter.
@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_prompt_shorter_than_the_window_can_be_captured(method: str) -> None:
    model, num_tokens = tiny.tiny_model("llama"), 20
    chosen = prepared(model, method)
    with compresskv.compressing(model, chosen, 12) as expected:
        tiny.read(model, expected, SEQUENCE, [num_tokens])
        with routing(model):
            cut = captured_prompt(model, num_tokens=num_tokens).compress(chosen, 12)
        assert_equal_caches(cut, expected)


# A capture must not hold every query of the prompt, nor all of a chunk through a view.
def test_a_capture_keeps_the_windows_queries_only() -> None:
    model = tiny.tiny_model("llama")
    with routing(model):
        for num_pieces in (1, 3):
            for layer in captured_prompt(model, num_pieces, window_size=WINDOW).cache.routed:
                queries = layer.window.queries
                assert queries.shape[2] == WINDOW
                assert queries.untyped_storage().nbytes() == queries.nbytes


@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_side_by_side_think_what_each_thinks_alone(family: str, store: str) -> None:
    """Of several budgets, with equal and unequal heads, and one that keeps everything."""
    model = tiny.tiny_model(family)
    with routing(model), torch.no_grad():
        captured = captured_prompt(model)
        caches = [
            captured.compress(prepared(model, method), budget, store=store)
            for method, budget in [("snapkv", 40), ("adakv", 40), ("vote", 12), ("blend", 61), ("snapkv", NUM_PROMPT)]
        ]
        new = SEQUENCE[:, NUM_PROMPT : NUM_PROMPT + 7]
        together = model(
            input_ids=new.expand(len(caches), -1), past_key_values=captured.side_by_side(caches, store)
        ).logits
        for row, cache in zip(together, caches, strict=True):
            alone = model(input_ids=new, past_key_values=cache).logits[0]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)
