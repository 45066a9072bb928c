"""A sample of what `tests/sweep` tries with every type: one of each kind that works, and one of each that does not."""

import re

import pytest
import transformers
from packaging.version import Version

import decoders
import shrunk

WORKING = [
    "gemma3",  # windows, and a model inside a model
    "jamba",
    "gemma4_text",  # heads that differ between layers
    "gemma3n_text",  # layers that attend to the keys of others
    "llama4_text",  # chunked attention beside full
    "cohere2",  # a window in most layers
    "lfm2_moe",  # convolutions between attention layers
    "qwen3_next",  # linear attention
    "qwen3_5_text",
    "nemotron_h",  # state spaces, and layers without a cache
    "gpt_oss",  # attention sinks
    "granite_swa",
    "gpt_bigcode",  # one KV head
    "qwen3_vl",  # positions of images
]
REFUSED = {
    "bert": "reads in both directions",
    "roberta": "reads in both directions",
    "bart": "more than one attention",
    "mllama": "cross-attention",
    "whisper": "more than one attention",
    "hrm_text": "more than one attention",
    "minimax": "cache of its own",
    "mamba": "attention interface|cache of its own",
    "gptj": "attention interface",
    "t5gemma2": "encoder-decoder",
    "diffllama": "changes values|attention interface",
    "doge": "masks each of its attention heads on its own",
    "diffusion_gemma": "generates in a way of its own",
    "jetmoe": "does not use the keys that the cache returns",
}


def known(model_type: str) -> str:
    if model_type not in shrunk.types():
        pytest.skip("these transformers do not know it")
    return model_type


@pytest.mark.parametrize("model_type", WORKING)
def test_it_equals_the_masked_reference(model_type: str) -> None:
    outcome = decoders.examine(known(model_type))
    if outcome.reason.endswith(decoders.NEWER):
        pytest.skip("these transformers keep its cache in another class")
    if model_type == "jamba" and outcome.word == "refused" and Version(transformers.__version__) < Version("5.6"):
        pytest.skip(f"these transformers build it otherwise: {outcome.reason}")
    assert outcome == decoders.Outcome("works")


@pytest.mark.parametrize("model_type", REFUSED)
def test_it_is_refused_before_anything_is_evicted(model_type: str) -> None:
    outcome = decoders.examine(known(model_type))
    if model_type == "gptj" and Version(transformers.__version__) >= Version("5.24"):
        assert outcome == decoders.Outcome("works")
        return
    assert outcome.word == "refused"
    assert re.search(REFUSED[model_type], outcome.reason)
