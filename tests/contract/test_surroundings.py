"""Settings of PyTorch's and calls of transformers' that surround a cache: they change nothing, or are refused."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import compresskv
import tiny
from compresskv import CacheStateError, ConfigError, Method
from compresskv.cache.stores.packed_vectors import rotation

NUM_PROMPT = 60
STEPS = [NUM_PROMPT, 1, 1, 1]


def read(
    model: PreTrainedModel, method: str, tokens: Tensor, own: dict[str, Any] | None = None, store: str = "native"
) -> Tensor:
    options = tiny.options_for(model, method) if own is None else own
    with compresskv.compressing(model, method, 20, store=store, **options) as cache:
        return tiny.read(model, cache, tokens, STEPS)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """`from_pretrained` of another thread sets it for all of the process."""
    rotation.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", [*tiny.METHODS, *tiny.REPLAYING_METHODS])
def test_the_default_dtype_may_be_another(method: str, dtype: torch.dtype) -> None:
    model, text = tiny.tiny_model("llama"), tiny.random_words(NUM_PROMPT)
    options, tokens = tiny.options_for(model, method), tiny.random_tokens(sum(STEPS))

    def found() -> Tensor:
        if method in tiny.REPLAYING_METHODS:
            given = {"method": method, "budget": 20, "store": "native", **options}
            session = compresskv.read(model, tiny.tokenizer(), text, **given)
            return torch.tensor(session.ask("7 8", max_new_tokens=4).token_ids)
        return read(model, method, tokens, options)

    expected = found()
    with default_dtype(dtype):
        assert torch.equal(found(), expected)


@pytest.mark.parametrize("method", ["rkv_ahead", "rkv"])
def test_nor_does_it_change_how_answers_are_cut(method: str) -> None:
    model, tokens = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    cuts = {"decode_budget": 20, "decode_interval": 8, "decode_method": method, **tiny.options_for(model, "vote")}

    def found() -> Tensor:
        with compresskv.compressing(model, "vote", 20, window_size=8, **cuts) as cache:
            return tiny.generate(model, tokens, cache, max_new_tokens=20)

    expected = found()
    with default_dtype(torch.bfloat16):
        assert torch.equal(found(), expected)


@pytest.mark.parametrize("store", tiny.PACKED_STORES)
def test_what_is_packed_is_packed_alike_whatever_the_default_dtype(store: str) -> None:
    model, tokens = tiny.tiny_model("llama"), tiny.random_tokens(sum(STEPS))
    rows, mask = tiny.left_padded([tiny.random_tokens(70), tiny.random_tokens(33)])

    def found() -> list[Tensor]:
        with compresskv.compressing(model, "snapkv", 0.4, store=store) as cache:
            padded = tiny.generate(model, rows, cache, attention_mask=mask)
        return [read(model, "adakv", tokens, store=store), padded]

    expected = found()
    with default_dtype(torch.bfloat16):
        first = found()
    for one in (first, found()):  # and nothing of it stays
        assert all(map(torch.equal, one, expected))


@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "blend"])
def test_inside_of_autocast_packing_loses_what_it_loses_anyway(method: str, store: str) -> None:
    model, tokens = tiny.tiny_model("llama"), tiny.random_tokens(sum(STEPS))

    def lost() -> float:
        found = read(model, method, tokens, store=store).float()
        return float((found - read(model, method, tokens).float()).abs().mean())

    usual = lost()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert lost() <= 2 * usual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inside_of_autocast_prompts_are_read_in_chunks_and_in_pieces_too(dtype: torch.dtype) -> None:
    model, tokens = tiny.tiny_model("llama"), tiny.random_tokens(sum(STEPS))
    ways: list[dict[str, Any]] = [{"prefill_memory": 1}, {"chunk_budget": NUM_PROMPT, "chunk_tokens": 16}]
    with torch.autocast("cpu", dtype=dtype):
        with compresskv.compressing(model, "full", 1) as cache:
            expected = tiny.read(model, cache, tokens, STEPS).float()
        for options in ways:
            with compresskv.compressing(model, "snapkv", NUM_PROMPT, **options) as cache:
                found = tiny.read(model, cache, tokens, STEPS).float()
            torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("method", ["snapkv", *tiny.REPLAYING_METHODS])
def test_a_session_may_be_read_and_asked_inside_of_autocast(method: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session = compresskv.read(tiny.tiny_model("llama"), tiny.tokenizer(), tiny.random_words(80), method=method)
        assert len(session.ask("7 8", max_new_tokens=3).token_ids) > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_without_a_cache_is_refused_where_one_is_given(family: str) -> None:
    model = tiny.tiny_model(family)
    with (
        compresskv.compressing(model, "snapkv", 1.0) as cache,
        pytest.raises(CacheStateError, match="use_cache=False"),
    ):
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache, use_cache=False)


def test_what_is_generated_around_another_model_is_not_looked_at() -> None:
    outer, inner = tiny.build_model("llama"), tiny.tiny_model("llama")
    tokens = tiny.random_tokens(NUM_PROMPT)
    session = compresskv.read(inner, tiny.tokenizer(), tiny.random_words(80), method="snapkv")
    expected = session.ask("7 8", max_new_tokens=3).token_ids
    heard = list[list[int]]()

    class Asking(BaseStreamer):
        def put(self, value: Tensor) -> None:
            heard.append(session.ask("7 8", max_new_tokens=3).token_ids)

        def end(self) -> None:
            pass

    tiny.generate(outer, tokens, None, max_new_tokens=2, streamer=Asking(), use_cache=False)
    assert len(heard) > 0
    assert heard == [expected] * len(heard)


def test_a_loop_of_ones_own_may_read_several_tokens_at_once() -> None:
    model, tokens = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)

    def jump(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        model(input_ids, past_key_values=cache)
        model(tiny.random_tokens(3, seed=1), past_key_values=cache)
        return torch.tensor([[cache.get_seq_length()]])

    with compresskv.compressing(model, "snapkv", 20) as cache:
        found = model.generate(tokens, past_key_values=cache, custom_generate=jump, max_new_tokens=2)
    assert found.tolist() == [[NUM_PROMPT + 3]]


@pytest.mark.stores("ragged", reason="the naive store gives no weights")
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "headkv", "blend", "expected_attention"])
@pytest.mark.parametrize("store", tiny.STORES)
def test_attentions_are_told_of_every_layer(method: str, store: str) -> None:
    model = tiny.tiny_model("llama", "eager")
    with compresskv.compressing(model, method, 20, store=store, **tiny.options_for(model, method)) as cache:
        output = model.generate(
            tiny.random_tokens(NUM_PROMPT),
            attention_mask=torch.ones(1, NUM_PROMPT, dtype=torch.long),
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
        counts = [max(layer.store.counts) for layer in cache.compressed_layers]
    config = model.config
    for step in output.attentions:
        assert len(step) == config.num_hidden_layers
    for weights, count in zip(output.attentions[-1], counts, strict=True):
        assert weights.shape == (1, config.num_attention_heads, 1, count)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)


def test_two_models_may_share_a_config() -> None:
    first = tiny.build_model("llama")
    torch.manual_seed(1)
    second = LlamaForCausalLM(first.config).eval().requires_grad_(False)
    assert second.config is first.config
    tokens = tiny.random_tokens(100)
    chunks = {"chunk_budget": 40, "chunk_tokens": 40}
    with compresskv.compressing(second, "snapkv", 20, **chunks) as cache:
        expected = tiny.generate(second, tokens, cache)
    with compresskv.compressing(first, "snapkv", 20):
        with compresskv.compressing(second, "snapkv", 20, **chunks) as cache:
            assert torch.equal(tiny.generate(second, tokens, cache), expected)
            assert cache.chunk_stats is not None
            assert cache.chunk_stats.num_cuts == 1
        assert first.config._attn_implementation == "compresskv_sdpa"
    assert first.config._attn_implementation == "sdpa"
    for model in (first, second):
        assert not any("forward" in vars(module) for module in model.modules())


def test_two_models_may_share_their_embeddings() -> None:
    first, second = tiny.build_model("llama"), tiny.build_model("llama")
    second.set_input_embeddings(first.get_input_embeddings())
    tokens, chunks = tiny.random_tokens(100), {"chunk_budget": 40, "chunk_tokens": 40}
    with compresskv.compressing(second, "snapkv", 20, **chunks) as cache:
        expected = tiny.generate(second, tokens, cache)
    with compresskv.compressing(first, "snapkv", 20), compresskv.compressing(second, "snapkv", 20, **chunks) as cache:
        assert torch.equal(tiny.generate(second, tokens, cache), expected)


def test_a_forward_that_is_set_inside_stays() -> None:
    model = tiny.build_model("llama")
    own = model.model.forward
    with compresskv.compressing(model, "snapkv", 20):

        def mine(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

        model.model.forward = mine
    assert model.model.forward is mine
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["model"]


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (lambda inputs: inputs.keys.norm(dim=-1)[..., :-4], r"\(1, 2, 56\)"),
        (lambda inputs: inputs.keys.norm(dim=-1)[0], r"\(2, 60\)"),
        (lambda inputs: inputs.window_attention.mean(dim=2), r"\(1, 6, 60\)"),
        (lambda inputs: inputs.keys.norm(dim=-1) > 1, "torch.bool"),
        (lambda inputs: inputs.keys.norm(dim=-1).long(), "torch.int64"),
    ],
)
def test_scores_that_are_none_are_told(scores: Any, found: str, *, together: bool) -> None:
    @dataclass(frozen=True)
    class Mine(Method):
        name = "mine"
        summary = source = "a test's own"
        decides_together = together
        window_size: int = 4

        def score(self, inputs: Any) -> Any:
            return scores(inputs)

    model = tiny.tiny_model("llama")
    with (
        compresskv.compressing(model, Mine(), 20) as cache,
        pytest.raises(ConfigError, match=rf"^method='mine' must score \(1, 2, 60\), .* its scores are {found}$"),
    ):
        tiny.read(model, cache, tiny.random_tokens(NUM_PROMPT), [NUM_PROMPT])


def test_so_are_those_of_a_method_that_cuts_answers() -> None:
    @dataclass(frozen=True)
    class Short(Method):
        name = "short"
        summary = source = "a test's own"
        window_size: int = 4

        def score(self, inputs: Any) -> Any:
            return inputs.keys.norm(dim=-1)[..., :-6]

    model, cuts = tiny.tiny_model("llama"), {"decode_budget": 20, "decode_interval": 8}
    with (
        compresskv.compressing(model, "snapkv", 20, decode_method=Short(), **cuts) as cache,
        pytest.raises(
            ConfigError, match=r"^decode_method='short' must score \(1, 2, \d+\), .* its scores are \(1, 2, "
        ),
    ):
        tiny.generate(model, tiny.random_tokens(NUM_PROMPT), cache, max_new_tokens=20)
