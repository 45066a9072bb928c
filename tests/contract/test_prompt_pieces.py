"""A prompt that layers read in pieces leaves what it leaves when it is read at once."""

import copy

import pytest
import torch
from torch import Tensor, nn

import compresskv
import tiny
from compresskv import CacheStateError, CompressedCache
from compresskv.attention import pieces
from compresskv.attention.routing import routing
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.routed import RoutedLayer
from compresskv.methods import registry
from compresskv.plans.capture import CapturedPrompt, WindowLayer, read_prompt

NUM_PROMPT, PIECE = 96, 20
STEPS = [NUM_PROMPT, 1, 1, 7, 1]
MODELS = [f"{family} {attention}" for family in tiny.FAMILIES for attention in tiny.ATTENTIONS]
OTHER_MODELS = ["llama_mha sdpa", "gemma2 eager", "gpt2 sdpa", "gpt2 eager", "gpt_oss eager"]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_AUTO_PIECE", PIECE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every query that reached a compressed layer."""
    return noted_queries(CompressedLayer, monkeypatch)


def noted_queries(kind: type[RoutedLayer], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    attend = kind.attend

    def noted(layer: RoutedLayer, attention: object, query: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(query.shape[2])
        return attend(layer, attention, query, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "attend", noted)
    return seen


def read(model_name: str, method: str, memory: int | str | None, mask: Tensor | None) -> tuple[Tensor, CompressedCache]:
    model = tiny.tiny_model(*model_name.split())
    sequence = tiny.random_tokens(sum(STEPS), batch_size=2)
    options = tiny.options_for(model, method)
    with compresskv.compressing(model, method, 24, prefill_memory=memory, **options) as cache:
        return tiny.read(model, cache, sequence, STEPS, mask), cache


@pytest.mark.parametrize("asked", ["by the call", "by the config"])
def test_a_prompt_whose_attention_is_asked_for_is_read_at_once(asked: str) -> None:
    model, prompt = tiny.build_model("llama", "eager"), tiny.random_tokens(NUM_PROMPT)
    given = {"output_attentions": True} if asked == "by the call" else {}
    model.config.output_attentions = not given
    with compresskv.compressing(model, "snapkv", 24) as cache:
        found = model(prompt, past_key_values=cache, **given).attentions
    assert [one.shape[-2:] for one in found] == [(NUM_PROMPT, NUM_PROMPT)] * 4
    for one, expected in zip(found, model(prompt, **given).attentions, strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("method", tiny.METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_pieces_change_nothing(model: str, method: str, padding: int, calls: list[int]) -> None:
    check_pieces(model, method, padding, calls)


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_pieces_change_nothing_without_grouped_queries_and_with_softcap_sinks_and_learned_positions(
    model: str, calls: list[int]
) -> None:
    check_pieces(model, "adakv", 13, calls)


def check_pieces(model: str, method: str, padding: int, calls: list[int]) -> None:
    mask = torch.ones(2, sum(STEPS), dtype=torch.long)
    mask[1, :padding] = 0
    whole, expected = read(model, method, None, mask if padding else None)
    assert max(calls) == NUM_PROMPT
    calls.clear()
    found, cache = read(model, method, "auto", mask if padding else None)
    assert max(calls) <= PIECE  # so it was read in pieces
    torch.testing.assert_close(found[0], whole[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1, padding:], whole[1, padding:], atol=1e-4, rtol=0)
    for own, other in zip(cache.compressed_layers, expected.compressed_layers, strict=True):
        assert own.positions is other.positions is None or torch.equal(own.positions, other.positions)
        assert own.retained_nbytes == other.retained_nbytes
        assert own.full_nbytes == other.full_nbytes


@pytest.mark.parametrize("window_size", [8, NUM_PROMPT])
@pytest.mark.parametrize("model", [*MODELS, *OTHER_MODELS])
def test_pieces_change_nothing_in_a_capture_and_its_replay(
    model: str, window_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noted_queries(WindowLayer, monkeypatch)
    own = tiny.tiny_model(*model.split())
    prompt = tiny.random_tokens(NUM_PROMPT)[0].tolist()
    with routing(own):
        whole, captured = CapturedPrompt(own, window_size, prefill_memory=None), CapturedPrompt(own, window_size)
        expected = whole.read(prompt[:-5]), whole.read(prompt[-5:])
        wanted = whole.replayed
        assert max(seen) > PIECE
        seen.clear()
        found = captured.read(prompt[:-5]), captured.read(prompt[-5:])
        replayed = captured.replayed
    assert max(seen) <= PIECE
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(replayed, wanted, atol=1e-4, rtol=1e-3)
    for layer, other in zip(captured.cache.routed, whole.cache.routed, strict=True):
        torch.testing.assert_close(layer.stored(), other.stored(), atol=1e-4, rtol=0)
        assert layer.window.queries.shape[2] == window_size
        torch.testing.assert_close(layer.window.queries, other.window.queries, atol=1e-4, rtol=0)


@pytest.mark.parametrize("memory", ["auto", None])
@pytest.mark.parametrize("method", tiny.REPLAYING_METHODS)
def test_a_prompt_is_read_twice_as_its_cache_is_to_read(
    method: str, memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noted_queries(WindowLayer, monkeypatch)
    exact: list[bool] = []
    make = CapturedPrompt.fill
    monkeypatch.setattr(
        CapturedPrompt,
        "fill",
        lambda own, cache: (exact.extend(layer.exact_prefill for layer in own.cache.routed), make(own, cache)),
    )
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)[0].tolist()
    compresskv.make_plan(model, prompt, method, 24, prefill_memory=memory)
    assert (max(seen) <= PIECE) == (memory == "auto")
    assert not any(exact)
    exact.clear()
    with routing(model):
        read_prompt(model, prompt, CompressedCache(model, registry.create(method), 24, exact_prefill=True))
    assert exact
    assert all(exact)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reading_and_replaying_are_told_of_as_they_go(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskv.plans.replay._chunk_tokens", lambda *_: 40)
    model, told = tiny.tiny_model(family), list[tuple[int, int]]()
    seen, when = noted_queries(WindowLayer, monkeypatch), list[int]()
    document = tiny.random_words(NUM_PROMPT)

    def note(done: int, layers: int) -> None:
        told.append((done, layers))
        when.append(len(seen))

    compresskv.ask(model, tiny.tokenizer(), document, "5 6", method="kvzip", on_prefill=note, max_new_tokens=1)
    total = told[0][1]
    assert {layers for _, layers in told} == {total}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == total
    assert len(set(when)) == len(told), "each after more was read"


def test_feed_forward_parts_of_other_layers_and_the_last_norm_read_pieces() -> None:
    model = tiny.tiny_model("gemma3")
    longest: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "mlp" in name:
            note = lambda own, inputs, name=name: longest.update({name: max(longest.get(name, 0), inputs[0].shape[1])})  # noqa: E731
            handles.append(module.register_forward_pre_hook(note))
    try:
        read("gemma3 sdpa", "snapkv", "auto", None)
    finally:
        for handle in handles:
            handle.remove()
    assert len(longest) == 3 * model.config.num_hidden_layers
    assert set(longest.values()) == {PIECE}


def test_chunks_of_generate_are_read_in_pieces(calls: list[int]) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    generated = []
    for memory in (None, "auto"):
        with compresskv.compressing(model, "snapkv", 24, prefill_memory=memory) as cache:
            generated.append(
                model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, prefill_chunk_size=50)
            )
    assert torch.equal(*generated)
    assert 50 in calls
    assert PIECE - 3 in calls


def test_the_model_gets_its_own_forward_back() -> None:
    model = tiny.build_model("llama")
    before = [module.forward for module in model.modules()]
    with compresskv.compressing(model, "snapkv", 24), compresskv.compressing(model, "full"):
        copied = copy.deepcopy(model)
    assert [module.forward for module in model.modules()] == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    prompt = tiny.random_tokens(NUM_PROMPT)
    with torch.no_grad():
        assert torch.equal(copied(prompt).logits, model(prompt).logits)


def test_contexts_may_end_in_another_order() -> None:
    model = tiny.build_model("llama")
    first, second = (compresskv.compressing(model, name, 24) for name in ("snapkv", "full"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "forward" in model.model.layers[0].__dict__
    second.__exit__(None, None, None)
    assert "forward" not in model.model.layers[0].__dict__


def test_an_interrupted_piece_is_noticed() -> None:
    model, prompt = tiny.build_model("llama"), tiny.random_tokens(NUM_PROMPT)
    count = 0

    def interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with compresskv.compressing(model, "snapkv", 24) as cache, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt, past_key_values=cache)
        handle.remove()
        with pytest.raises(CacheStateError, match="interrupted"):
            model(prompt, past_key_values=cache)
        cache.reset()
        found = model(prompt, past_key_values=cache).logits
        torch.testing.assert_close(found, model(prompt).logits, atol=1e-4, rtol=0)


def test_gradients_are_left_to_the_whole_prompt(calls: list[int]) -> None:
    model, prompt = tiny.tiny_model("llama"), tiny.random_tokens(NUM_PROMPT)
    with compresskv.compressing(model, "snapkv", 24) as cache:
        model(prompt, past_key_values=cache)
    assert set(calls) == {NUM_PROMPT}


def test_the_number_of_bytes_decides_the_length_of_a_piece() -> None:
    model = tiny.tiny_model("llama")
    method = registry.create("full")
    few, many = (CompressedCache(model, method, 1, prefill_memory=nbytes).piece_tokens for nbytes in (1, 10_000_000))
    assert few == pieces._LEAST_PIECE
    assert many is not None
    assert many > few


@pytest.mark.parametrize("value", [0, -1, True, "2GB", 1.5])
def test_what_is_no_number_of_bytes_is_refused(value: object) -> None:
    with pytest.raises(compresskv.ConfigError, match="prefill_memory"):
        compresskv.compressing(tiny.tiny_model("llama"), "full", prefill_memory=value)  # type: ignore[arg-type]
