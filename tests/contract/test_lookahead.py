"""Look-ahead: some tokens are generated with the full cache before it is cut, and their queries join the window."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import compresskv
import tiny
from compresskv import ConfigError, Method
from compresskv.cache.full import branch
from compresskv.evaluation.configurations import configurations
from compresskv.methods.prepare import prepare_method
from compresskv.methods.registry import parse_methods
from oracle import evictions, oracle_logits

NUM_PROMPT, AHEAD, BUDGET, WINDOW = 70, 3, 24, 8
STEPS = [NUM_PROMPT, *[1] * AHEAD, 1, 5, 1]
OBSERVING = ["snapkv", "adakv", "headkv", "cake", "vote", "blend"]  # whose budgets do not depend on the prompt's length


def prepared(family: str, name: str, **options: Any) -> Method:
    model = tiny.tiny_model(family)
    options = tiny.options_for(model, name) | options
    return prepare_method(model, name, options.pop("profile", None), **options)


@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_decodes_as_the_full_cache_and_then_as_the_masked_one(family: str, method: str) -> None:
    model, sequence = tiny.tiny_model(family), tiny.random_tokens(sum(STEPS), batch_size=2)
    with compresskv.compressing(model, prepared(family, method, lookahead=AHEAD), BUDGET) as cache:
        tiny.read(model, cache, sequence, STEPS[:1])
        full_nbytes = [layer.full_nbytes for layer in cache.compressed_layers]
        tiny.read(model, cache, sequence, STEPS[1:AHEAD])
        assert cache.nbytes > cache.full_nbytes
        assert [layer.full_nbytes for layer in cache.compressed_layers] == full_nbytes
        logits = tiny.read(model, cache, sequence, STEPS[AHEAD:])
        assert cache.nbytes < cache.full_nbytes
        gone = evictions(cache)
    assert {blocked.shape[-1] for blocked in gone.values()} == {NUM_PROMPT + AHEAD}
    assert not any(bool(blocked[..., NUM_PROMPT:].any()) for blocked in gone.values())
    layers = cache.compressed_layers
    assert sum(layer.mean_retained for layer in layers) == pytest.approx(len(layers) * BUDGET)
    kept = sum(float((~blocked).sum()) / blocked.shape[1] for blocked in gone.values()) / 2
    assert kept == pytest.approx(len(gone) * (BUDGET + AHEAD))
    expected = oracle_logits(family, sequence, gone)[:, NUM_PROMPT + AHEAD - 1 :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", OBSERVING)
def test_it_keeps_what_would_be_kept_if_the_generated_tokens_were_part_of_prompt_and_window(method: str) -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT + AHEAD)
    ahead = prepared("llama", method, window_size=WINDOW, lookahead=AHEAD)
    with compresskv.compressing(model, ahead, BUDGET) as cache:
        tiny.read(model, cache, sequence, STEPS[: AHEAD + 1])
    longer = replace(ahead, window_size=WINDOW + AHEAD, lookahead=0)
    with compresskv.compressing(model, longer, BUDGET + AHEAD) as expected:
        tiny.read(model, expected, sequence, [NUM_PROMPT + AHEAD])
    kept, wanted = (list(map(tiny.kept_tokens, one.compressed_layers)) for one in (cache, expected))
    assert kept == wanted
    with compresskv.compressing(model, replace(ahead, lookahead=0), BUDGET) as blind:
        tiny.read(model, blind, sequence, [NUM_PROMPT])
    assert kept != list(map(tiny.kept_tokens, blind.compressed_layers))


@pytest.mark.parametrize("method", ["snapkv", "vote"])
def test_each_beam_looks_ahead_alone(method: str) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, prepared("llama", method, lookahead=AHEAD), BUDGET) as cache:
        tokens = tiny.generate(model, prompt, cache, num_beams=3)
        assert cache.nbytes < cache.full_nbytes
    assert len(tokens[0]) > AHEAD


def test_rows_of_a_padded_batch_look_ahead_as_if_alone() -> None:
    model = tiny.tiny_model("llama")
    rows = [tiny.random_tokens(NUM_PROMPT), tiny.random_tokens(41, seed=1)]
    prompt, mask = tiny.left_padded(rows)
    steps = tiny.random_tokens(AHEAD, batch_size=2, seed=2)
    ahead = prepared("llama", "snapkv", lookahead=AHEAD)
    with compresskv.compressing(model, ahead, BUDGET) as cache:
        tiny.read(
            model,
            cache,
            torch.cat([prompt, steps], 1),
            STEPS[: AHEAD + 1],
            torch.cat([mask, mask.new_ones(2, AHEAD)], 1),
        )
    together = [tiny.kept_tokens(layer) for layer in cache.compressed_layers]
    for row, alone in enumerate(rows):
        with compresskv.compressing(model, ahead, BUDGET) as own:
            tiny.read(model, own, torch.cat([alone, steps[row : row + 1]], 1), [alone.shape[1], *[1] * AHEAD])
        padding = NUM_PROMPT - alone.shape[1]
        for layer, kept in zip(own.compressed_layers, together, strict=True):
            shifted = [[token + padding for token in head] for head in tiny.kept_tokens(layer)[0]]
            assert kept[row] == shifted


def test_an_answer_that_ends_first_is_the_full_caches() -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, prepared("llama", "snapkv", lookahead=50), BUDGET) as cache:
        tokens = tiny.generate(model, prompt, cache)
        assert cache.retained_nbytes == cache.nbytes > cache.full_nbytes
        assert [layer.mean_retained for layer in cache.compressed_layers] == [NUM_PROMPT] * 4
    assert torch.equal(tokens, tiny.generate(model, prompt))


def test_cropping_while_looking_ahead_takes_the_tokens_queries_back() -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT + AHEAD)
    ahead = prepared("llama", "snapkv", lookahead=AHEAD)
    kept = []
    for wrong in (0, 1):
        with compresskv.compressing(model, ahead, BUDGET) as cache:
            tiny.read(model, cache, sequence, [NUM_PROMPT, 1])
            if wrong:
                tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT + 2, seed=9), [1])
                cache.crop(-1)
            tiny.read(model, cache, sequence, [1, 1])
            kept.append([tiny.kept_tokens(layer) for layer in cache.compressed_layers])
    assert kept[0] == kept[1]


def test_a_branch_made_before_the_cut_is_cut_as_if_alone() -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT + AHEAD)
    other = torch.cat([sequence[:, :NUM_PROMPT], tiny.random_tokens(10, seed=5)], dim=1)
    ahead = prepared("llama", "snapkv", lookahead=AHEAD)
    with compresskv.compressing(model, ahead, BUDGET) as alone:
        tiny.read(model, alone, other, [NUM_PROMPT, 10])  # several tokens at once end the look-ahead, too
    with compresskv.compressing(model, ahead, BUDGET) as cache:
        tiny.read(model, cache, sequence, [NUM_PROMPT])
        branched = branch(cache)
        tiny.read(model, cache, sequence, [1] * AHEAD)
        tiny.read(model, branched, other, [10])
    kept, wanted = (list(map(tiny.kept_tokens, one.compressed_layers)) for one in (branched, alone))
    assert kept == wanted
    assert all(len(head) == BUDGET + 10 for head in kept[0][0])


def test_reset_looks_ahead_anew() -> None:
    model = tiny.tiny_model("llama")
    with compresskv.compressing(model, prepared("llama", "snapkv", lookahead=AHEAD), BUDGET) as cache:
        for num_tokens in (NUM_PROMPT, 50):
            tiny.read(model, cache, tiny.random_tokens(num_tokens + AHEAD), [num_tokens, *[1] * AHEAD])
            assert all(len(head) == BUDGET + AHEAD for head in tiny.kept_tokens(cache.compressed_layers[0])[0])
            cache.reset()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="lookahead=-1 must not be negative"):
        compresskv.compressing(tiny.tiny_model("llama"), "snapkv", lookahead=-1)
    with pytest.raises(ConfigError, match=r"'snapkv\[lookahead=2\]' looks ahead"):
        configurations(
            tiny.tiny_model("llama"), parse_methods("methods", "snapkv[lookahead=2]"), (64,), ("aware", "agnostic")
        )
