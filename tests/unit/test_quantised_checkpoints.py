"""Weights that libraries of others have quantised, as transformers loads them: each where its library is installed.

`pip install bitsandbytes optimum-quanto optimum gptqmodel` lets all of them run; none is needed for development.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

import compresskv
import tiny
from compresskv.models.fingerprint import fingerprint
from compresskv.models.quantize import quantize_int8, weights_dtype

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries

_SHAPE = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": tiny.PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Groups of 32 to 128 weights share a scale, which must fit."""


def _torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


def _gptq() -> GPTQConfig:
    texts = [tiny.random_words(200, seed=seed) for seed in range(4)]
    return GPTQConfig(bits=4, group_size=32, backend="torch", dataset=texts, tokenizer=tiny.build_tokenizer())


KINDS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "torchao, 8 bits": ("torchao", _torchao, "float32 (torchao)"),
    "bitsandbytes, 8 bits": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_8bit=True),
        "int8 (bitsandbytes)",
    ),
    "bitsandbytes, 4 bits": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        "float32 (bitsandbytes)",
    ),
    "quanto, 8 bits": ("optimum-quanto", lambda: QuantoConfig(weights="int8"), "float32 (quanto)"),
    "quanto, 4 bits": ("optimum-quanto", lambda: QuantoConfig(weights="int4"), "float32 (quanto)"),
    "quanto, float8": ("optimum-quanto", lambda: QuantoConfig(weights="float8"), "float32 (quanto)"),
    "GPTQ, 4 bits": ("gptqmodel", _gptq, "float32 (gptq)"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, as a user has it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_SHAPE))
    tiny.sharpen(model, seed=3)
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    library, *_ = KINDS[name]
    try:
        importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    return name


@pytest.fixture
def model(kind: str, plain: Path) -> PreTrainedModel:
    _, config, _ = KINDS[kind]
    quantised = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config(), device_map="cpu")
    return quantised.eval().requires_grad_(False)


def test_it_is_compressed_and_told_apart(model: PreTrainedModel, kind: str, plain: Path) -> None:
    prompt = tiny.random_tokens(70)
    whole = tiny.generate(model, prompt).tolist()
    with compresskv.compressing(model, "full", compile="always") as cache:
        assert tiny.generate(model, prompt, cache).tolist() == whole
    assert str(cache.not_compiled).startswith("it cannot read weights that are quantised by ")
    with compresskv.compressing(model, "blend", 24, profile=tiny.random_profile(model)) as cache:
        tiny.generate(model, prompt, cache)
    assert sum(layer.mean_retained for layer in cache.compressed_layers) == 24 * len(cache.compressed_layers)
    assert weights_dtype(model) == KINDS[kind][2]
    assert not fingerprint(model).matches(fingerprint(AutoModelForCausalLM.from_pretrained(plain)))
    with pytest.raises(compresskv.ConfigError, match="dtype='int8' cannot be made of weights that are quantised"):
        quantize_int8(model)


def test_packed_weights_tell_models_apart() -> None:
    """GPTQ and AWQ keep weights in buffers; what is left as parameters may be the same in 4 bits and in 8."""
    first, second = tiny.build_model("llama"), tiny.build_model("llama")
    for model, value in ((first, 1), (second, 2)):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_buffer("qweight", torch.full((4, 4), value, dtype=torch.int32))
    assert fingerprint(first).matches(fingerprint(second))  # of no consequence, then
    for model in (first, second):
        model.config.quantization_config = {"quant_method": "gptq"}
    assert not fingerprint(first).matches(fingerprint(second))
