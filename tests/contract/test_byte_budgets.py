"""A budget in bytes is what is held then, in every store."""

from typing import Any

import pytest

import compresskv
import tiny
from compresskv import ConfigError
from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.selection.precision import PRECISIONS

NUM_PROMPT = 420


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


def test_bytes_for_less_than_a_token_are_refused_in_one_line() -> None:
    model = tiny.tiny_model("llama")
    with (
        compresskv.compressing(model, "snapkv", "100B") as cache,
        pytest.raises(ConfigError, match=r"budget='100B' has no room for one token: that takes 512 bytes$"),
    ):
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
