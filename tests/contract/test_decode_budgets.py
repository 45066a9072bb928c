"""Caches that are cut while an answer is generated: logits are those of a full cache without what is gone."""

from itertools import product

import pytest
import torch

import compresskv
import tiny
from compresskv import ConfigError
from compresskv.cache import group
from compresskv.cache.generated import check_decoding
from compresskv.cache.timing import EvictionTimer
from compresskv.compression import Compressing
from compresskv.methods import registry
from compresskv.methods.base import Method
from compresskv.selection.cuts import DecodeBudget, DecodeStats
from oracle import Evictions, evictions, oracle_logits

NUM_PROMPT, NUM_NEW, BUDGET, INTERVAL = 60, 40, 24, 12


def cutting(
    model: object, decode_method: str | Method, method: str = "adakv", budget: float = 30, **options: object
) -> Compressing:
    given = {"decode_budget": BUDGET, "decode_interval": INTERVAL, "decode_method": decode_method}
    return compresskv.compressing(model, method, budget, **given, **options)


def read(model: object, context: Compressing, sequence: torch.Tensor) -> tuple[torch.Tensor, list[Evictions]]:
    """The logits, token by token, and what was gone after the prompt and after each cut."""
    found: list[Evictions] = []
    with context as cache:
        parts = [tiny.read(model, cache, sequence, [NUM_PROMPT])]
        found.append(evictions(cache))
        for _ in range(sequence.shape[1] - NUM_PROMPT):
            parts.append(tiny.read(model, cache, sequence, [1]))
            if (new := evictions(cache)) and (not found[-1] or seen(new) > seen(found[-1])):
                found.append(new)
                assert all(layer.store.counts == [BUDGET] * layer.store.num_heads for layer in cache.compressed_layers)
            assert all(max(layer.store.counts) <= max(BUDGET, 60) + INTERVAL for layer in cache.compressed_layers)
    return torch.cat(parts, dim=1), found


def seen(evicted: Evictions) -> int:
    return max(gone.shape[-1] for gone in evicted.values())


def cuts_behind(method: str, decode_method: str) -> bool:
    """Whether one may cut what another kept of a prompt."""
    try:
        check_decoding(registry.create(decode_method), registry.create(method), DecodeBudget(BUDGET, INTERVAL))
    except ConfigError:
        return False
    return True


COMMON = ["rkv", "snapkv", "streaming_llm", "triattention", "rkv_ahead"]
OTHERS = [name for name in registry.methods() if name not in COMMON and cuts_behind("adakv", name)]


@pytest.mark.parametrize(
    ("model", "decode_method"),
    [
        *product(["llama sdpa", "llama eager", "gemma3 sdpa", "gpt_oss eager"], COMMON),
        *(("llama sdpa", name) for name in OTHERS),
    ],
)
def test_logits_are_exact(model: str, decode_method: str) -> None:
    """Heads that hold different numbers after the prompt are cut each by itself, until all hold as many."""
    family, attention = model.split()
    own, sequence = tiny.tiny_model(family, attention), tiny.random_tokens(NUM_PROMPT + NUM_NEW, batch_size=2)
    options = tiny.options_for(own, decode_method)
    logits, gone = read(own, cutting(own, decode_method, **options), sequence)
    assert len(gone) == 1 + NUM_NEW // INTERVAL
    expected = oracle_logits(family, sequence, gone[0], None, *gone[1:])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "budget"), [("compresskv", 20), ("streaming_llm", 20), ("full", 1.0)])
def test_some_heads_choose_for_all_of_a_layer_that_hold_the_same_tokens(method: str, budget: float) -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT + NUM_NEW)
    options = tiny.options_for(model, "compresskv")
    logits, gone = read(model, cutting(model, "compresskv", method, budget, **options), sequence)
    assert len(gone) == 1 + NUM_NEW // INTERVAL
    expected = oracle_logits("llama", sequence, gone[0], None, *gone[1:])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for evicted in gone[-1].values():
        assert torch.equal(evicted[:, :1].expand_as(evicted), evicted)


@pytest.mark.parametrize("decode_method", ["vote", "rkv_shared", "streaming_llm"])
def test_all_layers_may_keep_the_same_tokens(decode_method: str) -> None:
    model, sequence = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT + NUM_NEW)
    method = registry.create(decode_method, **tiny.options_for(model, decode_method)).with_window(8)
    logits, gone = read(model, cutting(model, method, "streaming_llm", 20), sequence)
    expected = oracle_logits("llama", sequence, gone[0], None, *gone[1:])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for evicted in gone:
        first, *others = evicted.values()
        assert all(torch.equal(first, other) for other in others)


def test_candidates_leave_the_same_tokens_in_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a method that decides for all layers together goes on with."""
    monkeypatch.setattr(group, "LEAST_CANDIDATES", 8)
    model = tiny.tiny_model("llama")
    profile = tiny.options_for(model, "vote")
    options = {"decode_budget": BUDGET, "decode_interval": INTERVAL, **profile}
    with compresskv.compressing(model, "vote", 10, candidates=1, decode_method="rkv_shared", **options) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
        first, *others = [layer.positions for layer in cache.compressed_layers]
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("store", "compile"), [(store, "never") for store in tiny.STORES] + [("native", "always"), ("int4", "always")]
)
def test_generate_with_every_store(store: str, compile: str, uncompiled: None) -> None:
    """A compiled step reads the tokens whose queries are not looked at."""
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with cutting(model, "rkv", "snapkv", 20, store=store, compile=compile) as cache, torch.no_grad():
        tokens = tiny.generate(model, prompt, cache, max_new_tokens=NUM_NEW)
        assert tokens.shape[1] == NUM_NEW
        assert (cache.num_compiled_steps > NUM_NEW / 6) == (compile == "always")
        assert all(layer.store.counts == [BUDGET + 3] * 2 for layer in cache.compressed_layers)
        assert cache.decode_stats == DecodeStats(BUDGET, INTERVAL, "rkv", NUM_NEW // INTERVAL, None)
    if compile == "always":
        with cutting(model, "rkv", "snapkv", 20, store=store) as cache:
            assert torch.equal(tokens, tiny.generate(model, prompt, cache, max_new_tokens=NUM_NEW))


def test_padded_rows_and_prompts_that_are_kept_whole() -> None:
    model = tiny.tiny_model("llama")
    rows, mask = tiny.left_padded([tiny.random_tokens(20), tiny.random_tokens(9, seed=1)])
    with cutting(model, "rkv", "snapkv", 1.0) as cache:
        together = tiny.generate(model, rows, cache, attention_mask=mask, max_new_tokens=NUM_NEW)
        assert cache.decode_stats is not None
        assert cache.decode_stats.num_cuts == 3
        cache.reset()
        assert cache.decode_stats.num_cuts == 0
        assert str(cache.decode_stats.note).startswith(f"decode_budget={BUDGET} had no effect: ")
    for row, length in ((0, 20), (1, 9)):
        with cutting(model, "rkv", "snapkv", 1.0) as cache:
            alone = tiny.generate(model, rows[row : row + 1, 20 - length :], cache, max_new_tokens=NUM_NEW)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("decode_method", ["rkv", "rkv_shared"])
def test_whoever_times_eviction_hears_of_every_cut(decode_method: str) -> None:
    model, timer, decode = tiny.tiny_model("llama"), EvictionTimer(tiny.DEVICE), DecodeBudget(BUDGET, INTERVAL)
    method = registry.create("streaming_llm")
    options = {"decode": decode, "decode_method": registry.create(decode_method), "observer": timer}
    with Compressing(model, method, BUDGET, **options) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT + NUM_NEW), [NUM_PROMPT, *[1] * NUM_NEW])
    num_layers = len(cache.compressed_layers)
    assert timer.eviction.num_runs == (1 + NUM_NEW // INTERVAL) * num_layers
    assert timer.scoring.num_runs >= timer.eviction.num_runs


def test_sinks_and_the_latest_tokens() -> None:
    model = tiny.tiny_model("llama")
    with cutting(model, "streaming_llm", "snapkv", 20) as cache:
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache, max_new_tokens=INTERVAL + 1)
        first, *_ = tiny.kept_tokens(cache.compressed_layers[0])[0]
    assert len(first) == BUDGET
    assert first[-INTERVAL:] == list(range(NUM_PROMPT, NUM_PROMPT + INTERVAL))


def test_what_cannot_work_is_refused_by_name() -> None:
    model = tiny.tiny_model("llama")
    with pytest.raises(ConfigError, match=r"decode_method='rkv_shared' decides .* 'adakv' keeps others"):
        cutting(model, "rkv_shared")
    for method in ("cake", "blend", "defensivekv"):
        for prompt_method in ("adakv", "streaming_llm"):
            with pytest.raises(ConfigError, match=rf"decode_method='{method}' shares one budget among all layers"):
                cutting(model, method, prompt_method)
    for method in ("adakv", "snapkv"):
        with pytest.raises(
            ConfigError, match=rf"'compresskv' chooses by some heads .* '{method}' keeps others .*'rkv'"
        ):
            cutting(model, "compresskv", method)
    with pytest.raises(ConfigError, match=r"decode_method='compactor.*at once"):
        cutting(model, "compactor")
    with pytest.raises(ConfigError, match="decode_interval=4 must be at least 8"):
        compresskv.compressing(model, "snapkv", decode_budget=20, decode_interval=4)
    with pytest.raises(ConfigError, match="decode_budget=0"):
        compresskv.compressing(model, "snapkv", decode_budget=0)
