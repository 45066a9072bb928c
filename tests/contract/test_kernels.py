"""Models that were loaded with another attention implementation: their kernel reads prompts, sdpa what it cannot."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import compresskv
import tiny
from compresskv.attention import kernels, pieces
from compresskv.attention.prefill import causal_mask

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation='house")

NUM_PROMPT = 60
STEPS = [NUM_PROMPT, 1, 5, 1]

Calls = list[tuple[int, int]]


@pytest.fixture
def calls() -> Calls:
    """(new tokens, keys) of every call that reached the kernel."""
    return []


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_told", set())
    monkeypatch.setattr(kernels, "_failed", set())


def causal_kernel(calls: Calls) -> Callable[..., tuple[Tensor, None]]:
    """As flash attention: it takes no mask, and the last of its queries sees all keys."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None
        calls.append((query.shape[2], key.shape[2]))
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    return attend


def masked_kernel(calls: Calls, family: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """As the model's 'eager': all that is masked must be told, by the mask that its own function makes."""
    eager = tiny.build_model(family, "eager")
    function = __import__(type(eager).__module__, fromlist=["eager"]).eager_attention_forward

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        calls.append((query.shape[2], key.shape[2]))
        return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]

    return attend


@pytest.fixture
def registered() -> Iterator[Callable[..., str]]:
    """Registers a kernel, and its mask function where it has one, under a name of its own."""
    names = []

    def register(name: str, kernel: Callable[..., Any], mask: Callable[..., Any] | None = None) -> str:
        names.append(name)
        AttentionInterface.register(name, kernel)
        if mask is not None:
            AttentionMaskInterface.register(name, mask)
        return name

    yield register
    for name in names:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name, None)


def read(model: PreTrainedModel, method: str, mask: Tensor | None = None, **options: Any) -> Tensor:
    sequence = tiny.random_tokens(sum(STEPS), batch_size=2)
    options = tiny.options_for(model, method) | options
    with compresskv.compressing(model, method, 20, **options) as cache:
        return tiny.read(model, cache, sequence, STEPS, mask)


def built(family: str, name: str) -> PreTrainedModel:
    model = tiny.build_model(family, "eager")
    model.config._attn_implementation = name
    return model


def own_masks(*args: Any, **kwargs: Any) -> Tensor:
    return eager_mask(*args, **{**kwargs, "dtype": kwargs.get("dtype", torch.float32)})  # type: ignore[no-any-return]


@pytest.mark.parametrize("store", tiny.STORES)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt2"])
def test_a_prompt_is_read_by_the_models_own_kernel(
    family: str, method: str, store: str, calls: Calls, registered: Callable[..., str]
) -> None:
    expected = read(tiny.tiny_model(family, "eager"), method, store=store)
    model = built(family, registered("house", masked_kernel(calls, family), own_masks))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read(model, method, store=store)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    layers = model.config.num_hidden_layers
    assert calls[:layers] == [(NUM_PROMPT, NUM_PROMPT)] * layers
    assert model.config._attn_implementation == "house"
    assert len([one for one in said if "house" in str(one.message)]) <= 1  # of the five tokens that are read later


@pytest.mark.parametrize("method", ["snapkv", "blend"])
def test_a_kernel_without_masks_reads_whole_prompts_and_sdpa_what_is_padded(
    method: str, calls: Calls, registered: Callable[..., str]
) -> None:
    model, mask = built("llama", registered("house", causal_kernel(calls))), torch.ones(2, sum(STEPS), dtype=torch.long)
    torch.testing.assert_close(
        read(model, method, mask), read(tiny.tiny_model("llama"), method, mask), atol=1e-4, rtol=0
    )
    assert set(calls) == {(NUM_PROMPT, NUM_PROMPT)}
    calls.clear()
    kernels._told.clear()
    mask[1, :9] = 0
    with pytest.warns(UserWarning, match="'house' is not used where tokens are hidden"):
        found = read(model, method, mask)
    expected = read(tiny.tiny_model("llama"), method, mask)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1, 9:], expected[1, 9:], atol=1e-4, rtol=0)
    assert not calls


@pytest.mark.parametrize(
    ("name", "in_pieces"), [("house", {(20, 20)}), ("house_flash", {(20, 20), (20, 40), (20, 60)})]
)
def test_pieces_are_read_by_kernels_of_the_flash_family(
    name: str, in_pieces: set[tuple[int, int]], calls: Calls, registered: Callable[..., str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(pieces, "_AUTO_PIECE", 20)
    found = read(built("llama", registered(name, causal_kernel(calls))), "snapkv")
    torch.testing.assert_close(found, read(tiny.tiny_model("llama"), "snapkv"), atol=1e-4, rtol=0)
    assert set(calls) == in_pieces


def test_a_kernel_that_fails_is_left_alone_and_named(registered: Callable[..., str]) -> None:
    tries = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise RuntimeError("only half precision")

    model = built("llama", registered("house", fail))
    with pytest.warns(UserWarning, match=r"'house' failed here \(RuntimeError: only half precision\)"):
        found = read(model, "snapkv")
    torch.testing.assert_close(found, read(tiny.tiny_model("llama"), "snapkv"), atol=1e-4, rtol=0)
    assert len(tries) == 1


def test_ask_and_plans_go_through_the_kernel(calls: Calls, registered: Callable[..., str]) -> None:
    model, document = built("llama", registered("house", causal_kernel(calls))), tiny.random_words(50)
    answers = []
    for one in (tiny.tiny_model("llama"), model):
        for method in ("snapkv", "kvzip"):
            asked = compresskv.ask(one, tiny.tokenizer(), document, "5 6", method=method, budget=20, max_new_tokens=8)
            answers.append(asked.token_ids)
        plan = compresskv.make_plan(one, tiny.random_tokens(NUM_PROMPT)[0].tolist(), "snapkv", 20)
        answers.append([layer.positions for layer in plan.layers])
    assert answers[:3] == answers[3:]
    assert calls


@pytest.mark.stores(reason="nothing is stored")
def test_a_mask_of_blocks_is_for_all_of_a_prompt() -> None:
    """Which is read in pieces where it is long."""
    mask = create_block_mask(lambda _, __, query, key: query >= key, None, None, 60, 60, device="cpu")
    states, kernel = torch.zeros(1, 2, 60, 8), kernels.Kernel("flex_attention", mask)
    for num_new, num_seen in ((32, 32), (28, 60)):
        with pytest.warns(UserWarning, match="is not used for pieces of a prompt"):
            assert kernel.read(nn.Identity(), states[:, :, :num_new], *(states[:, :, :num_seen],) * 2, None) is None
        kernels._told.clear()
    assert not kernels._failed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_flex_attention_reads_prompts_where_it_can_be_compiled() -> None:
    model = tiny.build_model("llama", "flex_attention")
    with pytest.warns(UserWarning, match="not used where tokens are hidden"):
        found = read(model, "snapkv")
    torch.testing.assert_close(found, read(tiny.tiny_model("llama"), "snapkv"), atol=1e-4, rtol=0)
    assert not kernels._failed
    assert model.config._attn_implementation == "flex_attention"
