"""Models whose last layers have no keys of their own, and attend to those of layers before (Gemma 3n, Gemma 4)."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, cache_utils

import compresskv
import shrunk
import tiny
from compresskv import ModelError
from compresskv.cache.stores import packed, retain
from oracle import Evictions, evictions, masking
from rounding_store import assert_as_rounded, rounding

pytestmark = pytest.mark.skipif(not hasattr(cache_utils, "DummyLayer"), reason="in a cache of its own there")

SHARING = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
STEPS = [80, 5, 1]
BUDGET = 24
NUM_KEPT = 3


@pytest.fixture(scope="module", params=["gemma3n_text", "gemma4_text"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return shrunk.build(request.param, **SHARING)


@torch.no_grad()
def last_logits(model: PreTrainedModel, sequence: Tensor, evicted: Evictions) -> Tensor:
    with masking(model, evicted):
        logits = model(input_ids=sequence, use_cache=False).logits
    ends = torch.tensor(STEPS).cumsum(0).tolist()
    return torch.cat([logits[:, max(end - NUM_KEPT, end - new) : end] for end, new in zip(ends, STEPS, strict=True)], 1)


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "blend", "snapkv[lookahead=2]"])
def test_only_the_last_positions_go_through_the_layers_that_share(model: PreTrainedModel, method: str) -> None:
    """As in `generate`, which wants the last position's logits alone."""
    sequence = tiny.random_tokens(sum(STEPS)).clamp(max=99)
    logits, evicted = read(model, sequence, method)
    expected = last_logits(model, sequence, evicted)
    assert bool(evicted) == (method != "full")
    assert (logits - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.stores(reason="what is packed has stores of its own")
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
@pytest.mark.parametrize("store", tiny.PACKED_STORES)
def test_they_read_what_is_packed(
    model: PreTrainedModel, store: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)
    sequence = tiny.random_tokens(sum(STEPS)).clamp(max=99)
    logits, exact = (read(model, sequence, method, store=name)[0] for name in (store, "native"))
    monkeypatch.setitem(retain.PACKED_STORES, store, rounding(store))
    expected, _ = read(model, sequence, method, store=store)
    assert_as_rounded(logits[:, NUM_KEPT:], expected[:, NUM_KEPT:], exact[:, NUM_KEPT:])


@torch.no_grad()
def read(model: PreTrainedModel, sequence: Tensor, method: str, **options: Any) -> tuple[Tensor, Evictions]:
    (chosen,) = compresskv.methods.registry.parse_methods("method", method).values()
    options |= {"profile": tiny.random_profile(model)} if chosen.needs_profile else {}
    logits = []
    with compresskv.compressing(model, chosen, BUDGET, **options) as cache:
        for tokens in sequence.split(STEPS, dim=1):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=NUM_KEPT)
            logits.append(output.logits)
        return torch.cat(logits, dim=1), evictions(cache)


def test_what_was_evicted_is_freed(model: PreTrainedModel) -> None:
    with compresskv.compressing(model, "snapkv", BUDGET) as cache:
        output = model(input_ids=tiny.random_tokens(80).clamp(max=99), past_key_values=cache, use_cache=True)
        held = weakref.ref(cache.compressed_layers[0])
        del output
        assert cache.nbytes < cache.full_nbytes
    del cache
    gc.collect()
    assert held() is None


def test_layers_on_several_devices_are_refused(model: PreTrainedModel) -> None:
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"}
    try:
        with pytest.raises(ModelError, match="on several devices"), compresskv.compressing(model, "snapkv"):
            pass
    finally:
        del model.hf_device_map
