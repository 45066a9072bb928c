"""The identity of a model: the same for every way of loading it, different for other weights."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresskv.errors import ModelError
from compresskv.models.fingerprint import Fingerprint, fingerprint
from waits import Waits


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(shape | heads | changes)))  # type: ignore[arg-type]


@functools.cache
def llama() -> LlamaForCausalLM:
    """Never changed."""
    return tiny_llama()


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert next(model.parameters()).dtype == dtype
    return model


def test_the_shape() -> None:
    own = fingerprint(llama())
    assert replace(own, weights=None) == Fingerprint("llama", 2, 4, 2, 4, 40)
    assert own.weights is not None
    assert str(own) == f"llama-2x4x2x4x40-{own.weights}"
    assert str(replace(own, weights=None)) == "llama-2x4x2x4x40-any"
    assert fingerprint(tiny_llama(head_dim=8)).head_dim == 8
    assert fingerprint(tiny_llama(num_key_value_heads=4)).num_kv_heads == 4


def test_the_same_model_again() -> None:
    assert fingerprint(tiny_llama()) == fingerprint(llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bfloat16_checkpoint_loaded_otherwise(bf16_checkpoint: Path, dtype: torch.dtype) -> None:
    assert fingerprint(load(bf16_checkpoint, dtype)) == fingerprint(load(bf16_checkpoint, torch.bfloat16))


@pytest.mark.parametrize("value", [0.02, 2.0**-10, 2.0**-10 - 2.0**-20, 2.0**-10 - 2.0**-18, 1e-5, -1e-5, 1e-30, 0.0])
def test_a_float32_checkpoint_loaded_in_bfloat16(value: float) -> None:
    """A value just below the smallest that counts is rounded up to it: rounding must come before the comparison."""
    model = tiny_llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    full = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == full


@pytest.mark.parametrize("value", [0.02, 2.0**-10, 2.0**-11, 1e-6, -1e-6, 1e-30])
def test_a_bfloat16_checkpoint_loaded_in_float16(value: float) -> None:
    """float16 has too few bits for the smallest values, which therefore count as 0."""
    model = tiny_llama().to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    full = fingerprint(model)
    assert fingerprint(model.to(torch.float16)) == full


def test_gradients_and_device_copies_do_not_matter() -> None:
    assert fingerprint(tiny_llama().requires_grad_(False).eval()) == fingerprint(llama())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"vocab_size": 41},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 2},
        {"head_dim": 8},
        {"intermediate_size": 32},
    ],
    ids=str,
)
def test_another_model(changes: dict[str, Any]) -> None:
    other, own = fingerprint(tiny_llama(**changes)), fingerprint(llama())
    assert other != own
    assert not other.matches(own)
    assert not own.matches(other)


def test_one_changed_matrix_is_another_model() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert not fingerprint(model).matches(fingerprint(llama()))


def test_a_matrix_changed_behind_autograds_back_is_another_model() -> None:
    """As adapters are merged: neither the tensor's version nor its address tells."""
    model = tiny_llama()
    weight = model.lm_head.weight
    before, version, address = fingerprint(model), weight._version, weight.data_ptr()
    weight.data += 0.1
    assert (weight._version, weight.data_ptr()) == (version, address)
    assert not fingerprint(model).matches(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_checkpoint(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    with pytest.raises(ModelError, match=r"weight lm_head.weight holds NaN or infinity"):
        fingerprint(model)


def test_weights_that_are_not_loaded() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ModelError, match="is not loaded"):
        fingerprint(model)


class TestMatches:
    own = Fingerprint("llama", 2, 4, 2, 4, 40, "0123456789abcdef")

    def test_equal(self) -> None:
        assert self.own.matches(replace(self.own))

    def test_other_weights(self) -> None:
        assert not self.own.matches(replace(self.own, weights="fedcba9876543210"))

    def test_unknown_weights_match_by_shape(self) -> None:
        unknown = replace(self.own, weights=None)
        assert self.own.matches(unknown)
        assert unknown.matches(self.own)
        assert not unknown.matches(replace(self.own, num_layers=3))
        assert not replace(self.own, architecture="qwen2").matches(unknown)


def test_the_device_is_waited_for_once() -> None:
    model = llama()
    with Waits() as waits:
        fingerprint(model)
    assert [wait for wait in waits.seen if wait in ("cpu", "item", "tolist")] == ["cpu"]
