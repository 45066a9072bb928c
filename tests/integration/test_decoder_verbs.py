"""A sample of what `tests/sweep` tries with every type: the verbs run, or say what the cache says."""

from pathlib import Path

import pytest

import shrunk
import verbs
from decoders import NEWER

WORKING = ["gpt_oss", "gemma4_text", "gemma3n_text", "llama4", "qwen3_next", "lfm2_moe", "qwen2_5_vl", "dbrx"]
REFUSED = {
    "bert": "the model reads in both directions",
    "bloom": "the model does not use transformers' attention interface",
    "rwkv": "the model uses a cache of its own",
    "blip-2": "the model reads no text without images",
    "kosmos-2": "the model reads no text without images",
}


def said_of(model_type: str, folder: Path) -> verbs.Said:
    if model_type not in shrunk.types():
        pytest.skip("these transformers do not know it")
    try:
        return verbs.try_verbs(verbs.saved(model_type, folder))
    except (AttributeError, TypeError, ValueError) as error:  # of a config that lacks what its own model asks for
        pytest.skip(f"these transformers cannot build it: {error}")


@pytest.mark.parametrize("model_type", WORKING)
def test_ask_explain_and_profile_run(model_type: str, tmp_path: Path) -> None:
    said = said_of(model_type, tmp_path)
    if said["ask"].endswith(NEWER):
        pytest.skip("these transformers keep its cache in another class")
    assert said == {"ask": "", "explain": "", "profile": ""}


@pytest.mark.parametrize("model_type", REFUSED)
def test_they_refuse_in_one_line(model_type: str, tmp_path: Path) -> None:
    said = said_of(model_type, tmp_path)
    assert said.pop("profile").startswith(("the model has no grouped-query attention", REFUSED[model_type]))
    for line in said.values():
        assert line.startswith(REFUSED[model_type])
