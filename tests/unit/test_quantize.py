"""8-bit weights."""

import copy
import sys

import pytest
import torch

import compresskv
import tiny
from compresskv.compiled import decoding
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


def test_a_compiled_step_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path_factory.mktemp("cache")))
    decoding._loaded.clear()
    model, prompt = tiny.build_model("llama"), tiny.random_tokens(70)
    quantize_int8(model)
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
