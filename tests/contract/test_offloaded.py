"""Models whose weights accelerate keeps elsewhere: on the CPU's side or on disk, brought in module by module."""

import copy
from pathlib import Path

import pytest
from accelerate import cpu_offload, disk_offload
from transformers import PreTrainedModel

import compresskv
import planted
import tiny
from compresskv.models.fingerprint import fingerprint
from compresskv.models.place import input_device, is_offloaded

QUESTION = "what ?"


@pytest.fixture(params=["memory", "disk"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    model = tiny.build_model("llama")
    return cpu_offload(model, "cpu") if request.param == "memory" else disk_offload(model, tmp_path, "cpu")


# of older transformers, to which an offloaded model lies nowhere
@pytest.mark.filterwarnings("ignore:.*`input_ids` being on a device type different:UserWarning")
@pytest.mark.parametrize("store", tiny.STORES)
def test_it_reads_and_evicts_like_the_same_model_in_one_place(offloaded: PreTrainedModel, store: str) -> None:
    plain, prompt = tiny.tiny_model("llama"), tiny.random_tokens(60)
    assert offloaded.device.type == "meta"
    assert is_offloaded(offloaded)
    assert not is_offloaded(plain)
    assert input_device(offloaded) == input_device(plain)
    assert fingerprint(offloaded) == fingerprint(plain)
    answers = []
    for model in (plain, offloaded):
        options = {"profile": tiny.random_profile(plain), "store": store, "compile": "auto"}
        with compresskv.compressing(model, "blend", 20, **options) as cache:
            answers.append(tiny.generate(model, prompt, cache).tolist())
        assert all(layer.mean_retained < 60 for layer in cache.compressed_layers)
    assert answers[0] == answers[1]


def test_ask_answers() -> None:
    model, tokenizer = planted.build()
    document = " ".join(["one two three"] * 20)
    options = {"method": "snapkv", "budget": 24, "max_new_tokens": 4}
    expected = compresskv.ask(model, tokenizer, document, QUESTION, **options)
    moved = cpu_offload(copy.deepcopy(model), "cpu")
    answer = compresskv.ask(moved, tokenizer, document, QUESTION, **options, compile="always")
    assert answer.token_ids == expected.token_ids
    assert answer.stats.not_compiled == "its weights are offloaded, and lie elsewhere from token to token"
