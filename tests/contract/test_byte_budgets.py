"""A budget in bytes is what is held then, in every store."""

from typing import Any

import pytest

import compresskv
import tiny
from compresskv import ConfigError
from compresskv.cache.costs import costs_of
from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.selection.precision import PRECISIONS

NUM_PROMPT = 420


@pytest.mark.stores(reason="bytes are those of the stores that users have")
@pytest.mark.parametrize("budget", ["20kB", "20KiB", "15% of bytes"])
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_held_fits_and_another_token_would_not(family: str, store: str, method: str, budget: str) -> None:
    model = tiny.tiny_model(family)
    with compresskv.compressing(model, method, budget, store=store, **tiny.options_for(model, method)) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
    layers = cache.compressed_layers
    held, full = sum(layer.nbytes for layer in layers), sum(layer.full_nbytes for layer in layers)
    allowed = {"20kB": 20_000, "20KiB": 20_480, "15% of bytes": 0.15 * full}[budget]
    heads = [heads_of(decoder_config(model), layer_idx) for layer_idx in compressible_layers(model)]
    token = sum(own.num_kv_heads * PRECISIONS[store].nbytes(own.head_dim, 4) for own in heads)
    assert allowed - token < held <= allowed
    assert cache.full_nbytes > cache.retained_nbytes


def test_a_plan_made_for_a_store_keeps_as_many_tokens() -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    options: dict[str, Any] = {"budget": "20kB", "store": "int4"}
    plan = compresskv.make_plan(model, prompt[0].tolist(), "snapkv", **options)
    assert compresskv.Plan.from_dict(plan.to_dict()) == plan
    with compresskv.compressing(model, "snapkv", **options) as cache:
        tiny.read(model, cache, prompt, [NUM_PROMPT])
    assert plan.mean_retained == sum(layer.mean_retained for layer in cache.compressed_layers) / 4


@pytest.mark.stores(reason="each takes other bytes")
@pytest.mark.parametrize(("store", "took"), [("native", "512 bytes"), ("int4", "896 bytes in int4")])
def test_bytes_for_less_than_a_token_are_refused_in_one_line(store: str, took: str) -> None:
    model = tiny.tiny_model("llama")
    with (
        compresskv.compressing(model, "snapkv", "100B", store=store) as cache,
        pytest.raises(ConfigError, match=rf"budget='100B' has no room for one token: that takes {took}$"),
    ):
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])


@pytest.mark.stores(reason="bytes are those of the stores that users have")
@pytest.mark.parametrize("budget", ["10% of bytes", "6kB", 12, 0.1], ids=str)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "kvzip"])
@pytest.mark.parametrize("store", ["native", "int4"])
def test_a_document_grows_by_few_tokens_of_which_one_is_kept_at_least(store: str, method: str, budget: Any) -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tokenizer()
    session = compresskv.read(model, tokenizer, tiny.random_words(120), method=method, budget=budget, store=store)
    before = _means(session)
    session.append(tiny.random_words(3, seed=2))
    session.append(tiny.random_words(1, seed=3))
    assert session.facts.num_tokens == 125
    if isinstance(budget, float) or budget == "10% of bytes":
        assert _means(session) - before == 2 if store == "native" else _means(session) - before >= 2
    assert session.facts.kv_nbytes <= before * 512 + 6000


@pytest.mark.parametrize("budget", ["10% of bytes", "12kB"])
def test_what_is_kept_beside_tokens_is_counted_once_whatever_the_parts(budget: str) -> None:
    model, tokenizer, words = tiny.tiny_model("llama"), tiny.tokenizer(), tiny.random_words(240)
    options: dict[str, Any] = {"method": "snapkv", "budget": budget, "store": "int4"}
    whole = compresskv.read(model, tokenizer, words, **options)
    costs = costs_of(model, PRECISIONS["int4"])
    parts = compresskv.read(model, tokenizer, words, **options, max_memory=100 * costs.full)
    assert abs(_means(parts) - _means(whole)) <= 4 < 3 * costs.fixed / costs.held


@pytest.mark.parametrize("count", [6000, 10_000])
@pytest.mark.parametrize("store", tiny.STORES)
def test_a_document_that_grows_stays_within_a_count_of_bytes(store: str, count: int) -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tokenizer()
    session = compresskv.read(
        model, tokenizer, tiny.random_words(140), method="knorm", budget=f"{count} B", store=store
    )
    token = costs_of(model, PRECISIONS[store]).held
    for seed in (1, 2):
        session.append(tiny.random_words(45, seed=seed))
        assert count - 4 * token < session.facts.kv_nbytes <= count


def test_bytes_for_less_than_a_token_are_refused_as_typed_before_a_document_is_read() -> None:
    model, steps = tiny.tiny_model("llama"), []
    for options in ({}, {"max_memory": 10**6}, {"method": "kvzip"}):
        with pytest.raises(ConfigError, match=r"budget='100B' has no room for one token: that takes 512 bytes$"):
            compresskv.read(
                model,
                tiny.tokenizer(),
                tiny.random_words(120),
                budget="100B",
                store="native",
                on_read=lambda *done: steps.append(done),
                **{"method": "snapkv", **options},  # type: ignore[arg-type]
            )
    assert not steps


def _means(session: compresskv.Session) -> float:
    return session.facts.mean_retained
