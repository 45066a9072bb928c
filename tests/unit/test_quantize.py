"""8-bit weights."""

import copy
import sys

import pytest
import torch
import torchao.quantization as torchao
from transformers import PreTrainedModel

import compresskv
import tiny
from compresskv.bench.subject import random_subject
from compresskv.models.fingerprint import fingerprint
from compresskv.models.load import load
from compresskv.models.quantize import quantize_int8, weights_dtype


@torch.no_grad()
def test_weights_take_a_byte_and_outputs_stay_near() -> None:
    model, prompt = tiny.build_model("llama"), tiny.random_tokens(60)
    own, (expected, before) = fingerprint(model), (model(prompt).logits, nbytes(model))
    quantize_int8(model)

    found = model(prompt).logits
    assert 0 < float((found - expected).abs().max()) < 0.2 * float(expected.abs().max())
    assert nbytes(model) < 0.45 * before  # from float32, but for the embedding
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == own  # its profile still fits
    assert weights_dtype(model) == "int8"
    assert not any(weight.requires_grad for weight in model.parameters())


def nbytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


@pytest.mark.usefixtures("stored_packages")
def test_a_compiled_step_reads_them() -> None:
    """Of the model that `bench` measures in its test: one compiled step serves both."""
    subject = random_subject("tiny", None, 100, dtype="float32", device="cpu")
    model, prompt = subject.int8_model(), tiny.random_tokens(70)
    tokens = []
    for compile in ("never", "always"):
        with compresskv.compressing(model, "snapkv", 24, compile=compile) as cache:
            tokens.append(tiny.generate(model, prompt, cache).tolist())
    assert (cache.num_compiled_steps, cache.not_compiled) == (9, None)
    assert tokens[0] == tokens[1]


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(compresskv.ConfigError, match=r"dtype='int8' needs torchao: pip install 'compresskv\[int8\]'"):
        load("no-such-model", dtype="int8")


class TestQuantisedByOthers:
    """Here by torchao, whose tensors are of classes of their own, as those of other libraries are."""

    @pytest.fixture(params=["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
    def model(self, request: pytest.FixtureRequest) -> PreTrainedModel:
        model = tiny.build_model("llama")
        torchao.quantize_(model, getattr(torchao, request.param)(set_inductor_config=False))
        return model.requires_grad_(False)

    def test_its_identity_is_that_of_its_own_weights(self, model: PreTrainedModel) -> None:
        own = fingerprint(model)
        assert own.matches(fingerprint(copy.deepcopy(model)))
        assert not own.matches(fingerprint(tiny.tiny_model("llama")))

    def test_it_is_compressed_and_not_compiled(self, model: PreTrainedModel) -> None:
        prompt = tiny.random_tokens(70)
        plain = tiny.generate(model, prompt).tolist()
        kind = type(model.lm_head.weight).__name__
        with compresskv.compressing(model, "full", compile="always") as cache:
            assert tiny.generate(model, prompt, cache).tolist() == plain
        assert cache.not_compiled == f"it cannot read weights that are quantised by {kind}"
        with compresskv.compressing(model, "blend", 24, profile=tiny.random_profile(model), compile="auto") as cache:
            tiny.generate(model, prompt, cache)
        assert sum(layer.mean_retained for layer in cache.compressed_layers) == 24 * len(cache.compressed_layers)

    def test_its_dtype_tells(self, model: PreTrainedModel) -> None:
        kind = type(model.lm_head.weight).__name__
        assert weights_dtype(model) == f"float32 ({kind})"
        with pytest.raises(compresskv.ConfigError, match=rf"dtype='int8' cannot be made .* already, by {kind}"):
            quantize_int8(model)
