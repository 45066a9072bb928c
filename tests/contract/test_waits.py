"""On a GPU, a decode step must not wait for the device, nor eviction more than once a layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import compresskv
import tiny
from compresskv.cache.layer import CompressedLayer
from compresskv.compiled.decoding import CompiledDecoding
from compresskv.compression import Compressing
from waits import Waits

NUM_PROMPT = 70


def context(family: str, method: str, compile: str = "never") -> Compressing:
    model = tiny.tiny_model(family)
    return compresskv.compressing(model, method, 24, compile=compile, **tiny.options_for(model, method))


def test_waits_are_seen() -> None:
    tensor = torch.arange(3)
    for wait in (
        (tensor == 1).all().__bool__,
        tensor[0].item,
        tensor.tolist,
        lambda: torch.tensor([1, 2]),
        tensor.nonzero,
        lambda: range(5)[tensor[0]],
    ):
        with Waits() as waits:
            wait()
        assert len(waits.seen) == 1
    with Waits() as waits:
        tensor + 1
    assert waits.seen == []


@pytest.mark.stores("ragged", reason="no compiled step writes to the naive store")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("compile", ["never", "always"])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_decode_step_waits_for_nothing(family: str, method: str, compile: str) -> None:
    model, sequence = tiny.tiny_model(family), tiny.random_tokens(NUM_PROMPT + 8)
    with context(family, method, compile) as cache:
        tiny.read(model, cache, sequence, [NUM_PROMPT, 1, 1])
        with Waits() as waits:
            tiny.read(model, cache, sequence, [1] * 6)
        assert cache.num_compiled_steps == (8 if compile == "always" else 0)
    assert waits.seen == []


@pytest.mark.stores(reason="waits are those of the stores that users have")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", tiny.EVICTING_METHODS)
def test_a_layer_is_cut_with_one_wait(method: str, padded: bool) -> None:
    model, seen = tiny.tiny_model("llama"), []
    rows, mask = tiny.left_padded([tiny.random_tokens(NUM_PROMPT), tiny.random_tokens(NUM_PROMPT - 30 * padded)])

    def watch(layer: CompressedLayer) -> None:
        retain = layer.retain

        def watched(*args: Any) -> None:
            with Waits() as waits:
                retain(*args)
            seen.append(waits.seen)

        layer.retain = watched  # type: ignore[method-assign]

    with context("llama", method) as cache:
        for layer in cache.compressed_layers:
            watch(layer)
        tiny.read(model, cache, rows, [NUM_PROMPT], mask)
    assert seen == [["tolist"]] * len(cache.compressed_layers)


class OnDevice(Tensor):
    """A mask that says that it lies elsewhere."""

    device = torch.device("cuda")  # type: ignore[assignment]


def test_a_mask_on_a_gpu_is_read_once_after_each_prompt() -> None:
    with context("llama", "snapkv") as cache:
        compiled = CompiledDecoding(tiny.tiny_model("llama"), cache, "always")

        def waits(mask: Tensor, expected: bool) -> int:
            with Waits() as seen:
                assert compiled._hides_nothing(mask.as_subclass(OnDevice)) == expected
            return len(seen.seen)

        ones = [torch.ones(1, length, dtype=torch.long) for length in range(12)]
        assert [waits(ones[length], True) for length in (5, 6, 7)] == [1, 0, 0]
        assert waits(ones[9], True) == 1, "it has grown by more than the new token"
        hiding = ones[10].clone()
        hiding[0, 2] = 0
        compiled.forward(lambda **_: None, input_ids=torch.ones(1, 3))  # a prompt
        assert waits(hiding, False) == 1
        assert compiled._hides_nothing(hiding) is False
        assert compiled._hides_nothing(ones[11]) is True
