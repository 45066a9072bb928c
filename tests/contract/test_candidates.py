"""Methods that decide for all layers together hold candidates while they wait, not the whole prompt."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import compresskv
import tiny
from compresskv import CompressedCache, ConfigError
from compresskv.attention import pieces
from compresskv.attention.routing import routing
from compresskv.cache import group
from compresskv.cache.candidates import CandidateStats
from compresskv.cache.group import Group
from compresskv.cache.layer import CompressedLayer
from compresskv.methods.prepare import prepare_method
from compresskv.methods.registry import methods
from compresskv.plans.capture import CapturedPrompt
from compresskv.selection.budgets import Budget
from compresskv.selection.select import EMPTY_SLOT
from compresskv.sessions.reading import read_and_cut, read_on
from oracle import evictions, oracle_logits

NUM_PROMPT, BUDGET, FEW = 96, 12, 2
STEPS = [NUM_PROMPT, 1, 1, 7, 1]
ALL = -(-NUM_PROMPT // BUDGET)
WAITING = [name for name in tiny.METHODS if methods()[name].decides_together]
MODELS = ["llama sdpa", "gemma3 eager"]


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """The candidates (B, H, C) that each layer held last, of however short a prompt, even if it holds all of it."""
    seen: dict[int, Tensor] = {}
    hold = CompressedLayer.hold

    def noted(layer: CompressedLayer, tokens: Tensor) -> None:
        hold(layer, tokens)
        seen[layer.layer_idx] = tokens

    monkeypatch.setattr(CompressedLayer, "hold", noted)
    monkeypatch.setattr(group, "LEAST_CANDIDATES", 1)
    monkeypatch.setattr(group, "MUCH_LONGER", 1)
    monkeypatch.setattr(Group, "has_spare", lambda *_: True)
    return seen


def mask(padding: int) -> Tensor | None:
    if not padding:
        return None
    mask = torch.ones(2, sum(STEPS), dtype=torch.long)
    mask[1, :padding] = 0
    return mask


def read(
    model_name: str, method: str, candidates: int | None, padding: int = 0, **options: Any
) -> tuple[Tensor, CompressedCache]:
    model, sequence = tiny.tiny_model(*model_name.split()), tiny.random_tokens(sum(STEPS), batch_size=2)
    options = tiny.options_for(model, method) | options
    with compresskv.compressing(model, method, BUDGET, candidates=candidates, **options) as cache:
        return tiny.read(model, cache, sequence, STEPS, mask(padding)), cache


def chosen(cache: CompressedCache) -> Iterator[list[list[list[int]]]]:
    return (tiny.kept_tokens(layer) for layer in cache.compressed_layers)


@pytest.mark.parametrize("options", [{}, {"lookahead": 2}, {"store": "int8"}], ids=str)
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("method", WAITING)
@pytest.mark.parametrize("model", MODELS)
def test_as_many_candidates_as_tokens_choose_what_the_whole_prompt_does(
    model: str, method: str, padding: int, options: dict[str, Any], held: dict[int, Tensor]
) -> None:
    expected, exact = read(model, method, None, padding, **options)
    assert not held
    found, cache = read(model, method, ALL, padding, **options)
    assert len(held) == len(cache.compressed_layers) - 1
    assert list(chosen(cache)) == list(chosen(exact))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("method", WAITING)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_kept_are_candidates_in_exact_numbers_and_decoded_with_alone(
    model: str, method: str, padding: int, held: dict[int, Tensor]
) -> None:
    logits, cache = read(model, method, FEW, padding)
    layers = cache.compressed_layers
    assert sorted(held) == [layer.layer_idx for layer in layers[:-1]]
    told = cache.candidate_stats
    assert told == CandidateStats(FEW, len(held), max(tokens.shape[2] for tokens in held.values()), None)
    for layer, kept in zip(layers[:-1], chosen(cache), strict=False):
        rows = held[layer.layer_idx].expand(2, len(kept[0]), -1).tolist()
        for own, among in zip(kept, rows, strict=True):
            assert all(set(head) <= set(held_by) - {EMPTY_SLOT} for head, held_by in zip(own, among, strict=True))
            assert all(len(set(held_by) - {EMPTY_SLOT}) == FEW * BUDGET for held_by in among)
    assert tiny.kept_counts(cache).sum(dim=(0, 2)).tolist() == [BUDGET * len(layers) * layers[0].store.num_heads] * 2
    sequence = tiny.random_tokens(sum(STEPS), batch_size=2)
    expected = oracle_logits(model.split(maxsplit=1)[0], sequence, evictions(cache), mask(padding))
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, padding:], expected[1, padding:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", WAITING)
def test_a_padded_row_keeps_what_it_keeps_alone(method: str) -> None:
    model, rows = tiny.tiny_model("llama"), [tiny.random_tokens(NUM_PROMPT), tiny.random_tokens(70, seed=1)]
    tokens, masks = tiny.left_padded(rows)
    kept = []
    for given, own in [(tokens, masks), *((row, None) for row in rows)]:
        with compresskv.compressing(model, method, 20, candidates=FEW, **tiny.options_for(model, method)) as cache:
            tiny.read(model, cache, given, [given.shape[1]], own)
        kept.append(list(chosen(cache)))
    together, first, second = kept
    padding = NUM_PROMPT - 70
    for layer, one, two in zip(together, first, second, strict=True):
        assert layer[0] == one[0]
        assert [[token - padding for token in head] for head in layer[1]] == two[0]


@pytest.mark.parametrize("method", WAITING)
def test_pieces_chunks_and_captures_hold_the_same_candidates(
    method: str, held: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_AUTO_PIECE", 20)
    _, whole = read("llama sdpa", method, FEW, prefill_memory=None)
    expected = dict(held)
    _, in_pieces = read("llama sdpa", method, FEW)
    assert all(torch.equal(held[layer], expected[layer]) for layer in expected)
    assert list(chosen(in_pieces)) == list(chosen(whole))
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    prepared = prepare_method(model, method, tiny.options_for(model, method).get("profile"))
    with compresskv.compressing(model, prepared, BUDGET, candidates=FEW, prompt_tokens=NUM_PROMPT) as chunks:
        tiny.read(model, chunks, sequence, [50, NUM_PROMPT - 50])
    with compresskv.compressing(model, prepared, BUDGET, candidates=FEW) as alone:
        tiny.read(model, alone, sequence, [NUM_PROMPT])
    with routing(model):
        captured = CapturedPrompt(model, max(1, prepared.num_observed()))
        captured.read(sequence[0].tolist())
        filled = CompressedCache(model, prepared, BUDGET, candidates=FEW)
        captured.fill(filled)
    assert list(chosen(chunks)) == list(chosen(alone)) == list(chosen(filled))


@pytest.mark.parametrize("method", ["blend", "forecast"])
def test_beams_go_on_from_what_candidates_left(method: str, held: dict[int, Tensor]) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT, batch_size=2)
    generated = []
    for candidates in (None, ALL):
        with compresskv.compressing(
            model, method, BUDGET, candidates=candidates, **tiny.options_for(model, method)
        ) as cache:
            generated.append(tiny.generate(model, prompt, cache, num_beams=3))
    assert held
    assert torch.equal(*generated)


@pytest.mark.parametrize("method", WAITING)
def test_a_plan_is_exact(method: str, held: dict[int, Tensor]) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    options = tiny.options_for(model, method)
    plan = compresskv.make_plan(model, prompt[0].tolist(), method, BUDGET, **options)
    assert not held
    with compresskv.compressing(model, method, BUDGET, candidates=None, **options) as cache:
        tiny.read(model, cache, prompt, [NUM_PROMPT])
    for layer, kept in zip(plan.layers, chosen(cache), strict=True):
        assert [list(own) for own in layer.positions] == (kept[0] if len(layer.positions) > 1 else kept[0][:1])


@pytest.mark.parametrize("budget", [BUDGET, "10% of bytes", 0.1], ids=str)
@pytest.mark.parametrize("store", ["native", "int4"])
def test_a_documents_first_part_is_read_with_candidates_and_later_ones_are_held_whole(
    store: str, budget: Budget, held: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny.tiny_model("llama"), tiny.random_tokens(2 * NUM_PROMPT)[0].tolist()
    method = prepare_method(model, "forecast", tiny.random_profile(model))

    def kept() -> list[list[list[list[int]]]]:
        cache = read_and_cut(model, text[:NUM_PROMPT], method, budget, store=store)
        num_held = len(held)
        held.clear()
        read_on(model, cache, text[NUM_PROMPT:], method, budget)
        assert not held
        assert num_held in (0, len(cache.compressed_layers) - 1)
        return [*chosen(cache), [[[num_held]]]]

    few = kept()
    monkeypatch.setattr(group, "LEAST_CANDIDATES", NUM_PROMPT)
    all_held = kept()
    monkeypatch.setattr(Group, "has_spare", lambda *_: False)
    exact = kept()
    assert few[-1] == all_held[-1] != exact[-1]
    assert all_held[:-1] == exact[:-1]
    assert sum(len(head) for layer in few[:-1] for head in layer[0]) == sum(
        len(head) for layer in exact[:-1] for head in layer[0]
    )


@pytest.mark.stores(reason="what is held until the end is not in a store yet")
def test_a_document_is_read_exactly_where_that_is_asked_for(held: dict[int, Tensor]) -> None:
    model, words = tiny.tiny_model("llama"), tiny.random_words(NUM_PROMPT)
    options: dict[str, Any] = {"method": "blend", "budget": BUDGET, **tiny.options_for(model, "blend")}
    found = []
    for candidates in (4, None):
        session = compresskv.read(model, tiny.tokenizer(), words, store="native", candidates=candidates, **options)
        found.append((len(held), chosen(session.cache)))
        held.clear()
    (num_held, _), (none_held, exact) = found
    assert (num_held, none_held) == (model.config.num_hidden_layers - 1, 0)
    plan = compresskv.make_plan(model, session.token_ids, **options)
    assert [[list(own) for own in layer.positions] for layer in plan.layers] == [kept[0] for kept in exact]
    with pytest.raises(ConfigError, match="candidates=0"):
        compresskv.read(model, tiny.tokenizer(), words, candidates=0, **options)


@pytest.mark.parametrize("method", WAITING)
def test_a_layers_prompt_is_garbage_before_the_next_layer_is_reached(method: str) -> None:
    model, seen, alive = tiny.tiny_model("llama"), list[weakref.ref[Tensor]](), list[int]()

    def watch(layer: CompressedLayer) -> None:
        update = layer.update

        def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            alive.append(sum(reference() is not None for reference in seen))
            stored = update(*args, **kwargs)
            seen.extend(weakref.ref(tensor) for tensor in (*args[:2], *stored))
            return stored

        layer.update = watched  # type: ignore[method-assign]

    with compresskv.compressing(model, method, BUDGET, candidates=FEW, **tiny.options_for(model, method)) as cache:
        for layer in cache.compressed_layers:
            watch(layer)
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
    assert alive == [0] * len(cache.compressed_layers)


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("snapkv", {}, "method 'snapkv' decides layer by layer"),
        ("cake", {"chunk_budget": 40, "chunk_tokens": 32}, "prompts that are cut in chunks hold no more than these"),
        ("cake", {}, "the prompt of 96 tokens is not long enough for it"),
    ],
)
def test_candidates_that_made_no_difference_are_told_of(
    method: str, options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    _, cache = read("llama sdpa", method, 9, **options)
    assert cache.candidate_stats == CandidateStats(9, 0, None, f"candidates=9 had no effect: {why}")
    for usual in (None, compresskv.defaults.CANDIDATES):
        assert read("llama sdpa", method, usual, **options)[1].candidate_stats is None


def test_a_method_that_names_no_candidates_is_told_of(held: dict[int, Tensor]) -> None:
    """However long the prompt is."""
    _, cache = read("llama sdpa", "vote", FEW, local_weight=0)
    why = "method 'vote[local_weight=0]' cannot tell before all layers are read"
    assert cache.candidate_stats == CandidateStats(FEW, 0, None, f"candidates={FEW} had no effect: {why}")
    assert not held


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "4"])
def test_what_is_no_number_of_candidates_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="candidates"):
        compresskv.compressing(tiny.tiny_model("llama"), "full", candidates=value)  # type: ignore[arg-type]
