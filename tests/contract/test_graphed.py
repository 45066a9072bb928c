"""Decoding by a recorded step gives what decoding without one gives; recording itself needs a GPU."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compresskv
import tiny
from compresskv.cache.stores.base import ROOM
from compresskv.compiled import decoding
from compresskv.compiled.graph import GraphedStep
from compresskv.compiled.inputs import Places, gather_inputs, kinds_of

NUM_PROMPT = 70
NUM_STEPS = ROOM + 6  # so that every layer needs new room once


class Recorder:
    """Runs on a CPU what a GPU would replay: on the same tensors, into the same result."""

    def __init__(self) -> None:
        self.num_recordings = 0
        self.num_replays = 0

    def __call__(self, run: Callable[[], Tensor], _: torch.device) -> tuple[Callable[[], object], Tensor]:
        self.num_recordings += 1
        run()  # as on a GPU, it runs before it is recorded
        result = torch.zeros_like(run())

        def replay() -> None:
            self.num_replays += 1
            result.copy_(run())

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Contexts on CPUs use recorded steps."""
    recorder = Recorder()

    def get_program(self: Any, kinds: tuple[str, ...]) -> GraphedStep:
        return GraphedStep(self._model, kinds, recorder)

    monkeypatch.setattr(decoding.CompiledDecoding, "_get_package", get_program)
    return recorder


def read(
    model: PreTrainedModel, method: str, compile: str, steps: list[int], store: str = "native"
) -> tuple[Tensor, Any]:
    sequence = tiny.random_tokens(sum(steps)).to(model.device)
    options = tiny.options_for(model, method)
    with compresskv.compressing(model, method, 24, compile=compile, store=store, **options) as cache:
        return tiny.read(model, cache, sequence, steps), cache


@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_recorded_steps_compute_what_the_model_does(recorder: Recorder, family: str, method: str) -> None:
    model, steps = tiny.tiny_model(family), [NUM_PROMPT] + [1] * NUM_STEPS
    expected, held = read(model, method, "never", steps)
    found, cache = read(model, method, "always", steps)
    assert (cache.num_compiled_steps, cache.not_compiled) == (NUM_STEPS, None)
    assert recorder.num_replays == NUM_STEPS
    assert recorder.num_recordings == 2  # once more when there was no room left
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert [layer.seen_tokens for layer in cache.compressed_layers] == [
        layer.seen_tokens for layer in held.compressed_layers
    ]


@pytest.mark.parametrize("store", tiny.PACKED_STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_recorded_steps_read_what_is_packed_until_more_is(recorder: Recorder, method: str, store: str) -> None:
    model, steps = tiny.tiny_model("llama"), [NUM_PROMPT] + [1] * NUM_STEPS
    expected, _ = read(model, method, "never", steps, store)
    found, cache = read(model, method, "always", steps, store)
    assert (cache.num_compiled_steps, cache.not_compiled) == (NUM_STEPS, None)
    assert recorder.num_recordings == 2  # once more when the tail was packed
    assert float((found - expected).abs().mean()) < 2e-4


@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_other_steps_in_between_are_seen(recorder: Recorder, method: str) -> None:
    model, steps = tiny.tiny_model("llama"), [NUM_PROMPT, 1, 1, 5, 1, 1, 3, 1]
    expected, _ = read(model, method, "never", steps)
    found, cache = read(model, method, "always", steps)
    assert cache.num_compiled_steps == recorder.num_replays == 5
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_logits_are_the_callers_own(recorder: Recorder) -> None:
    model = tiny.tiny_model("llama")
    with torch.no_grad(), compresskv.compressing(model, "snapkv", 24, compile="always") as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
        first = model(input_ids=torch.tensor([[3]]), past_key_values=cache).logits
        kept = first.clone()
        model(input_ids=torch.tensor([[4]]), past_key_values=cache)
    assert recorder.num_replays == 2
    assert torch.equal(first, kept)


def test_generate(recorder: Recorder) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    texts = []
    for compile in ("never", "always"):
        with compresskv.compressing(model, "snapkv", 24, compile=compile) as cache:
            texts.append(tiny.generate(model, prompt, cache).tolist())
    assert texts[0] == texts[1]
    assert recorder.num_replays == 9


def test_sliding_windows_go_the_usual_way(recorder: Recorder) -> None:
    model, steps = tiny.tiny_model("gemma3"), [NUM_PROMPT, 1, 1]
    expected, _ = read(model, "snapkv", "never", steps)
    found, cache = read(model, "snapkv", "always", steps)
    assert cache.num_compiled_steps == recorder.num_recordings == 0
    assert "sliding window" in cache.not_compiled
    assert torch.equal(found, expected)


def test_what_cannot_be_recorded_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Callable[[], Tensor], _: torch.device) -> tuple[Callable[[], object], Tensor]:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(
        decoding.CompiledDecoding, "_get_package", lambda self, kinds: GraphedStep(self._model, kinds, refuse)
    )
    model, steps = tiny.tiny_model("llama"), [NUM_PROMPT, 1, 1, 1]
    expected, _ = read(model, "snapkv", "never", steps)
    found, cache = read(model, "snapkv", "always", steps)
    assert cache.num_compiled_steps == 0
    assert cache.not_compiled == (
        "its decode step cannot be recorded (operation not permitted when stream is capturing)"
    )
    assert torch.equal(found, expected)


def test_what_a_step_refuses_goes_the_usual_way(recorder: Recorder) -> None:
    model, steps = tiny.build_model("llama", "eager"), [NUM_PROMPT, 1, 1]  # without hooks that other tests leave
    expected, _ = read(model, "adakv", "never", steps)
    found, cache = read(model, "adakv", "always", steps)
    assert cache.num_compiled_steps == recorder.num_replays == 0
    assert "plain sdpa" in cache.not_compiled
    assert torch.equal(found, expected)


def test_a_recording_does_not_keep_a_cache_alive() -> None:
    def forget(run: Callable[[], Tensor], _: torch.device) -> tuple[Callable[[], object], Tensor]:
        return lambda: None, run()

    model = tiny.tiny_model("llama")
    with torch.no_grad(), compresskv.compressing(model, "snapkv", 24) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
        step = GraphedStep(model, kinds_of(cache), forget)
        token, position = torch.tensor([[3]]), torch.tensor([[NUM_PROMPT]])
        inputs = gather_inputs(cache, token, position, step.kinds, Places())
        step(inputs)
        held = weakref.ref(inputs.keys[0])
        del inputs
        cache.reset()
        assert held() is None
        assert step.record_s > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["snapkv", "adakv", "blend"])
def test_on_a_gpu(method: str) -> None:
    model, steps = tiny.build_model("llama").to("cuda"), [NUM_PROMPT] + [1] * 300
    expected, _ = read(model, method, "never", steps)
    found, cache = read(model, method, "always", steps)
    assert (cache.num_compiled_steps, cache.not_compiled) == (300, None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
