"""Heads of which no power of two is the size: packed stores turn and pack what they hold in blocks."""

from typing import Any

import pytest
from torch import Tensor

import compresskv
import tiny
from compresskv.cache.stores import packed, retain
from rounding_store import assert_as_rounded, rounding

NUM_PROMPT = 60
STEPS = [NUM_PROMPT, 1, 1, 5, 1, 1]
pytestmark = pytest.mark.stores(reason="what is packed has stores of its own")


def read(size: int, method: str, store: str, compile: str = "never") -> tuple[Tensor, Any]:
    model = tiny.tiny_model(f"llama_{size}")
    with compresskv.compressing(model, method, 24, store=store, compile=compile) as cache:
        return tiny.read(model, cache, tiny.random_tokens(sum(STEPS)), STEPS)[:, NUM_PROMPT:], cache


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
@pytest.mark.parametrize("store", tiny.PACKED_STORES)
@pytest.mark.parametrize("size", [80, 96, 112])
def test_packed_entries_are_those_that_are_rounded(
    size: int, store: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TAIL", 3)
    (found, _), (in_steps, cache), (exact, _) = (
        read(size, method, *options) for options in ((store,), (store, "always"), ("native",))
    )
    assert cache.num_compiled_steps == STEPS.count(1)
    assert {layer.store.states[0].shape[-1] for layer in cache.compressed_layers} == {size}
    monkeypatch.setitem(retain.PACKED_STORES, store, rounding(store))
    expected, _ = read(size, method, store)
    for logits in (found, in_steps):
        assert_as_rounded(logits, expected, exact)
