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
from compresskv.compiled.graph import GraphedStep, Run
from compresskv.compiled.inputs import Places, gather_inputs, kinds_of
from compresskv.compiled.waits import NoWaits

NUM_PROMPT = 70
NUM_STEPS = ROOM + 3  # so that every layer needs new room once


class Recorder:
    """Runs on a CPU what a GPU would replay: on the same tensors, into the same result."""

    def __init__(self) -> None:
        self.num_recordings = 0
        self.num_replays = 0

    def __call__(self, run: Run, device: torch.device) -> tuple[Callable[[], object], list[Tensor]]:
        self.num_recordings += 1
        with NoWaits(device):
            run()  # as on a GPU, it runs before it is recorded
        results = [torch.zeros_like(result) for result in run()]

        def replay() -> None:
            self.num_replays += 1
            for result, found in zip(results, run(), strict=True):
                result.copy_(found)

        return replay, results


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Contexts on CPUs use recorded steps."""
    recorder = Recorder()

    monkeypatch.setattr(decoding, "records_steps", lambda _: True)
    monkeypatch.setattr(decoding, "GraphedStep", lambda model, kinds: GraphedStep(model, kinds, recorder))
    return recorder


def read(
    model: PreTrainedModel, method: str, compile: str, steps: list[int], store: str = "native", num_rows: int = 1
) -> tuple[Tensor, Any]:
    sequence = tiny.random_tokens(sum(steps), num_rows).to(model.device)
    options = tiny.options_for(model, method)
    with compresskv.compressing(model, method, 24, compile=compile, store=store, **options) as cache:
        return tiny.read(model, cache, sequence, steps), cache


@pytest.mark.stores("ragged", reason="no compiled step writes to the naive store")
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


@pytest.mark.stores(reason="what is packed has stores of its own")
@pytest.mark.parametrize("store", tiny.PACKED_STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_recorded_steps_unpack_what_is_packed_as_on_gpus(
    recorder: Recorder, method: str, store: str, unpacked: list[Tensor]
) -> None:
    test_recorded_steps_read_what_is_packed_until_more_is(recorder, method, store)
    assert len(unpacked) >= NUM_STEPS * tiny.tiny_model("llama").config.num_hidden_layers


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


@pytest.mark.stores(reason="whether a step is recorded depends on the store")
@pytest.mark.parametrize("method", ["snapkv", "adakv", "blend"])
@pytest.mark.parametrize("family", ["gemma3", "gemma2", "gpt_oss"])
def test_sliding_windows_are_copied_to_and_from_the_recording(recorder: Recorder, family: str, method: str) -> None:
    attention = "sdpa" if family == "gemma3" else "eager"
    model, steps = tiny.tiny_model(family, attention), [NUM_PROMPT, *[1] * 20, 5, 1, 1]
    expected, held = read(model, method, "never", steps)
    found, cache = read(model, method, "always", steps)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    if method == "snapkv" or family == "gemma3":
        assert (cache.num_compiled_steps, cache.not_compiled) == (22, None)
        assert recorder.num_recordings <= 3
    else:
        assert "plain sdpa" in cache.not_compiled
    for own, other in zip(cache.layers, held.layers, strict=True):
        if not hasattr(own, "store"):
            torch.testing.assert_close((own.keys, own.values), (other.keys, other.values), rtol=2e-4, atol=2e-4)
            assert own.get_seq_length() == other.get_seq_length()


def test_a_window_that_is_not_full_goes_the_usual_way_until_it_is(recorder: Recorder) -> None:
    model, steps = tiny.tiny_model("gemma3"), [12, *[1] * 8]  # a window of 16, the new token's own place included
    expected, _ = read(model, "snapkv", "never", steps)
    found, cache = read(model, "snapkv", "always", steps)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert cache.num_compiled_steps == recorder.num_replays == 5


def test_branches_of_a_window_do_not_see_each_other(recorder: Recorder) -> None:
    model, sequence = tiny.tiny_model("gemma3"), tiny.random_tokens(NUM_PROMPT + 8)
    with torch.no_grad(), compresskv.compressing(model, "snapkv", 24, compile="always") as cache:
        tiny.read(model, cache, sequence, [NUM_PROMPT, 1, 1])
        branch = cache.branch()
        before = [layer.keys.clone() for layer in branch.layers if not hasattr(layer, "store")]
        tiny.read(model, cache, sequence, [1, 1, 1])
        assert recorder.num_replays == 5
        after = [layer.keys for layer in branch.layers if not hasattr(layer, "store")]
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.stores(reason="whether a step is recorded depends on the store")
@pytest.mark.parametrize("method", ["snapkv", "vote", "headkv", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_without_padding_are_recorded_together(recorder: Recorder, family: str, method: str) -> None:
    model, steps = tiny.tiny_model(family), [NUM_PROMPT, 1, 1, 1]
    expected, _ = read(model, method, "never", steps, num_rows=3)
    found, cache = read(model, method, "always", steps, num_rows=3)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert (cache.num_compiled_steps, recorder.num_recordings) == (3, 1)


def test_padded_rows_and_rows_that_differ_go_the_usual_way(recorder: Recorder) -> None:
    model, rows = tiny.tiny_model("llama"), [tiny.random_tokens(NUM_PROMPT), tiny.random_tokens(60, seed=1)]
    tokens, mask = tiny.left_padded(rows)
    texts = []
    for compile in ("never", "always"):
        with compresskv.compressing(model, "adakv", 24, compile=compile) as cache:
            texts.append(tiny.generate(model, tokens, cache, attention_mask=mask).tolist())
            texts.append(cache.num_compiled_steps)
    assert texts[0] == texts[2]
    assert texts[3] == recorder.num_replays == 0
    assert cache.not_compiled == "rows of the batch hold different numbers of tokens"


def test_beams_whose_rows_are_reordered_are_soon_left_alone(recorder: Recorder) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    texts = []
    for compile in ("never", "always"):
        with compresskv.compressing(model, "snapkv", 24, compile=compile) as cache:
            texts.append(tiny.generate(model, prompt, cache, num_beams=3, max_new_tokens=20).tolist())
    assert texts[0] == texts[1]
    assert 0 < recorder.num_recordings <= 3
    assert cache.not_compiled == "its cache lies elsewhere from token to token"


def test_steps_are_recorded_without_being_asked_once_decoding_has_taken_a_moment(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, "snapkv", 24, compile="never") as cache:
        expected = tiny.generate(model, prompt, cache).tolist()
    for least_s, num_replays in ((1e-9, 8), (60.0, 0)):  # of nine steps, the first one tells what they take
        monkeypatch.setattr(decoding, "_RECORDING_S", least_s)
        recorder.num_replays = 0
        with compresskv.compressing(model, "snapkv", 24) as cache:
            assert tiny.generate(model, prompt, cache).tolist() == expected
        assert cache.num_compiled_steps == recorder.num_replays == num_replays


def test_what_cannot_be_recorded_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(run: Run, _: torch.device) -> tuple[Callable[[], object], list[Tensor]]:
        tried.append(run())
        try:
            raise ValueError("the kernel was not launched\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(decoding, "records_steps", lambda _: True)
    monkeypatch.setattr(decoding, "GraphedStep", lambda model, kinds: GraphedStep(model, kinds, refuse))
    model, steps = tiny.build_model("llama"), [NUM_PROMPT, 1, 1, 1]
    expected, _ = read(model, "snapkv", "never", steps)
    for _ in range(2):  # for another prompt it is not tried again
        found, cache = read(model, "snapkv", "always", steps)
        assert cache.num_compiled_steps == 0
        assert cache.not_compiled == "its decode step cannot be recorded (the kernel was not launched)"
        assert torch.equal(found, expected)
    assert len(tried) == 1


@pytest.mark.stores(reason="of what is read again, none is asked")
def test_what_would_wait_for_a_gpu_is_named_before_anything_is_recorded(recorder: Recorder) -> None:
    model, steps = tiny.build_model("llama"), [NUM_PROMPT, 1, 1]
    norm = model.model.norm

    def waiting(states: Tensor) -> Tensor:
        return type(norm).forward(norm, states) if bool(states.sum() < 1e9) else states

    norm.forward = waiting
    found, cache = read(model, "snapkv", "always", steps)
    assert (
        cache.not_compiled
        == "its decode step cannot be recorded (it waits for what aten._local_scalar_dense.default gives)"
    )
    torch.testing.assert_close(found, read(model, "snapkv", "never", steps)[0])


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.item,
        Tensor.nonzero,
        bool,
        lambda one: one[one > 0],
        lambda one: torch.zeros(1).index_put_((one > 0,), one),
        lambda one: torch.masked_select(one, one > 0),
        lambda one: one.to("meta"),
    ],
)
def test_what_waits(wait: Callable[[Tensor], object]) -> None:
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match="it waits for what"), NoWaits(one.device):
        wait(one)
    with NoWaits(torch.device("cuda")):  # a CPU's numbers are there
        torch.ones(1).item()
    with NoWaits(one.device):
        torch.zeros(3).index_copy_(0, torch.tensor([1]), one).double().cumsum(0)


def test_what_a_step_refuses_goes_the_usual_way(recorder: Recorder) -> None:
    model, steps = tiny.build_model("llama", "eager"), [NUM_PROMPT, 1, 1]  # without hooks that other tests leave
    expected, _ = read(model, "adakv", "never", steps)
    found, cache = read(model, "adakv", "always", steps)
    assert cache.num_compiled_steps == recorder.num_replays == 0
    assert "plain sdpa" in cache.not_compiled
    assert torch.equal(found, expected)


@pytest.mark.stores(reason="of one that holds what it shows")
def test_what_gets_new_room_is_not_held_twice() -> None:
    model = tiny.tiny_model("llama")
    with torch.no_grad(), compresskv.compressing(model, "snapkv", 24) as cache:
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])
        inputs = gather_inputs(cache, torch.tensor([[3]]), torch.tensor([[NUM_PROMPT]]), kinds_of(cache), Places())
        for layer, keys, values in zip(cache.compressed_layers, inputs.keys, inputs.values, strict=True):
            for held, room in (
                (layer.keys, keys),
                (layer.values, values),
                *zip(layer.tensors, (keys, values), strict=True),
            ):
                assert held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()


def test_a_recording_does_not_keep_a_cache_alive() -> None:
    def forget(run: Run, _: torch.device) -> tuple[Callable[[], object], list[Tensor]]:
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
@pytest.mark.parametrize(("family", "num_rows"), [("llama", 1), ("gemma3", 1), ("llama", 3)])
def test_on_a_gpu(family: str, num_rows: int, method: str) -> None:
    if num_rows > 1 and method != "snapkv":
        pytest.skip("rows keep different numbers of tokens")
    model, steps = tiny.build_model(family).to("cuda"), [NUM_PROMPT] + [1] * 300
    expected, _ = read(model, method, "never", steps, num_rows=num_rows)
    found, cache = read(model, method, "always", steps, num_rows=num_rows)
    assert (cache.num_compiled_steps, cache.not_compiled) == (300, None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
