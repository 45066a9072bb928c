"""The cache goes by the name that these transformers have for it, and by the old one as long as they take it."""

import warnings

import pytest
import torch

import compresskv
import tiny
from compresskv.models.arguments import CACHE, CACHE_NAMES, cache_argument, given_cache, with_cache

NAMES = sorted({CACHE, "past_key_values"})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_prompts_are_cut_by_either_name(family: str, name: str) -> None:
    model, prompt = tiny.tiny_model(family), tiny.random_tokens(90)
    found = []
    for given in (name, CACHE):
        with compresskv.compressing(model, "snapkv", 24, chunk_budget=40, chunk_tokens=32) as cache, torch.no_grad():
            output = model.generate(prompt, max_new_tokens=3, do_sample=False, **{given: cache})
            assert cache.compressed_layers[0].num_retained < 40
        with compresskv.compressing(model, "snapkv", 24) as cache, torch.no_grad():
            hidden = model.base_model(prompt, **{given: cache}).last_hidden_state
            assert cache.compressed_layers[0].num_retained == 24
        found.append((output, hidden))
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


def test_nothing_of_ours_is_warned_of() -> None:
    """Neither while a prompt is read in chunks, nor when a step is compiled, nor when answers are compared."""
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(91)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compresskv.compressing(model, "snapkv", 24, chunk_budget=40, chunk_tokens=32) as cache:
            tiny.read(model, cache, prompt, [90, 1])


def test_models_from_elsewhere_may_have_the_old_name() -> None:
    class Old(torch.nn.Module):
        def forward(self, input_ids: object, past_key_values: object = None) -> None: ...

    class Any(torch.nn.Module):
        def forward(self, *args: object, **kwargs: object) -> None: ...

    assert (cache_argument(Old()), cache_argument(Any())) == ("past_key_values", CACHE)
    for name in CACHE_NAMES:
        given = {name: 1, "other": 2}
        assert given_cache(given) == 1
        assert with_cache(given, 3) == {name: 3, "other": 2}
    assert given_cache({"past_key_values": None}) is None
