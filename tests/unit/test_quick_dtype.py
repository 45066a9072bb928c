"""The dtype that a processor without instructions for the checkpoint's own is given."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import compresskv
import tiny
from compresskv.models import dtype as quick_dtype
from compresskv.models.dtype import multiplies, use_quick_dtype
from compresskv.system import memory

CPU = torch.device("cpu")


@pytest.fixture
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without instructions for two-byte numbers."""
    monkeypatch.setattr(quick_dtype, "_CHECKS", dict.fromkeys((torch.bfloat16, torch.float16), "_no_such_check"))


def test_float32_is_quick_everywhere_and_every_dtype_on_a_gpu(old_processor: None) -> None:
    assert multiplies(torch.float32, CPU)
    assert multiplies(torch.bfloat16, torch.device("cuda"))
    assert not multiplies(torch.bfloat16, CPU)
    assert not multiplies(torch.float16, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_slow_dtype_becomes_float32_without_a_loss(old_processor: None, dtype: torch.dtype) -> None:
    model = tiny.build_model("llama").to(dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    use_quick_dtype(model)
    assert model.dtype == model.config.dtype == torch.float32
    assert all(torch.equal(weight.to(dtype), before[name]) for name, weight in model.named_parameters())


def test_a_model_that_would_not_fit_stays_as_it_is(old_processor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build_model("llama").bfloat16()
    monkeypatch.setattr(memory, "available_nbytes", lambda _: 4 * model.num_parameters() - 1)
    use_quick_dtype(model)
    assert model.dtype == torch.bfloat16


WORDS = tiny.random_words(80)
VERBS: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "compressing": lambda model, _: compresskv.compressing(model, "snapkv"),
    "ask": lambda model, _: compresskv.ask(model, tiny.tokenizer(), WORDS, "7", method="snapkv", two_pass=True),
    "make_plan": lambda model, _: compresskv.make_plan(model, [5] * 40, "snapkv", 20),
    "read": lambda model, _: compresskv.read(model, tiny.tokenizer(), WORDS, method="snapkv"),
    "open_session": lambda model, path: compresskv.open_session(path, model, tiny.tokenizer()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_warns_of_a_slow_dtype_once(
    old_processor: None, monkeypatch: pytest.MonkeyPatch, verb: str, tmp_path: Path
) -> None:
    model = tiny.build_model("llama").bfloat16()
    if verb == "open_session":
        compresskv.read(model, tiny.tokenizer(), WORDS, method="snapkv").save(tmp_path / "kept.kvc")
    monkeypatch.setattr(quick_dtype, "_FEW_WEIGHTS", 1)
    with pytest.warns(UserWarning, match="float32 is faster") as told:
        VERBS[verb](model, tmp_path / "kept.kvc")
    assert [one.filename for one in told] == [__file__]


def test_a_users_own_model_is_left_alone_and_the_cure_is_named(
    old_processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build_model("llama").bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compresskv.compressing(model, "snapkv")  # too small to matter
        monkeypatch.setattr(quick_dtype, "_FEW_WEIGHTS", 1)
        compresskv.compressing(tiny.tiny_model("llama"), "snapkv")
    with pytest.warns(UserWarning, match=r"no instructions for bfloat16.*float32 is faster") as told:
        compresskv.compressing(model, "snapkv")
    assert [one.filename for one in told] == [__file__]
    assert model.dtype == torch.bfloat16
