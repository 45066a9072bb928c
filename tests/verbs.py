"""What the verbs do with one type of model, loaded from a folder as a user has it: they run, or say why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import compresskv
import planted
import shrunk
import tiny
from compresskv.calibration.find import find_profile
from compresskv.calibration.measure import NothingRetrievedError
from compresskv.calibration.settings import CalibrationSettings
from compresskv.errors import ModelError
from compresskv.explain.retention import explain
from compresskv.methods.snapkv import SnapKV
from compresskv.models.shape import compressible_layers

BUDGET = 24
VOCAB_SIZE = 1024
NUM_POSITIONS = 1024
DOCUMENT = " ".join(planted.haystack_sentences(5))
PROMPT = torch.arange(3, 63)[None]
SETTINGS = CalibrationSettings(
    lengths=(256,), depths=(50,), num_rotations=1, max_new_tokens=4, error_documents=1, replay_documents=1
)

NO_GROUPS = "has no grouped-query attention"
"""What `profile` refuses a model for that others work with."""

Said = dict[str, str]
"""Verb -> nothing where it ran, else the line with which it refused. 'load' is there only where it did."""


def saved(model_type: str, folder: Path) -> Path:
    """A model of this type and a tokenizer, as a user has them.

    Raises:
        Exception: whatever transformers says of a config that it cannot build.
    """
    model = shrunk.build(model_type, vocab_size=VOCAB_SIZE, num_positions=NUM_POSITIONS)
    model.save_pretrained(folder)
    shrunk.config(model_type, VOCAB_SIZE, NUM_POSITIONS).save_pretrained(folder)  # whole, be the model its decoder
    planted.bytes_tokenizer().save_pretrained(folder)
    return folder


def try_verbs(folder: Path) -> Said:
    """What `load` and the verbs say of what was saved to a folder; a model's class is 'the model' there.

    Raises:
        AssertionError: one refuses in several lines, or after it has answered.
        Exception: what no verb should end with.
    """
    try:
        model, tokenizer = compresskv.load(str(folder), device="cpu")
    except ModelError as error:
        return {"load": _line(error)}
    verbs: dict[str, Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], None]] = {
        "ask": _ask,
        "explain": _explain,
        "profile": _profile,
    }
    said: Said = {}
    for verb, run in verbs.items():
        try:
            run(model, tokenizer, folder)
            said[verb] = ""
        except ModelError as error:
            said[verb] = _line(error).replace(type(model).__name__, "the model")
    return said


def _ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, _: Path) -> None:
    heard: list[int] = []
    ways: list[Callable[[], dict[str, Any]]] = [
        lambda: {"method": "snapkv"},
        lambda: {"profile": tiny.random_profile(model)},
        lambda: {"profile": tiny.random_profile(model), "two_pass": True},
    ]
    try:
        for way in ways:
            given = {"budget": BUDGET, "max_new_tokens": 4, "on_token": heard.append, **way()}
            stats = compresskv.ask(model, tokenizer, DOCUMENT, "What?", **given).stats
            assert 1 <= stats.generated_tokens <= 4
            assert 0 < stats.retained_fraction < 0.5
    except ModelError:
        assert not heard
        raise


def _explain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, _: Path) -> None:
    told = explain(model, tokenizer, PROMPT, SnapKV(), BUDGET, max_new_tokens=2)
    assert [layer.layer_idx for layer in told.retention.layers] == compressible_layers(model)


def _profile(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        found = find_profile(model, tokenizer, "tiny", folder / "runs", SETTINGS).profile
    except NothingRetrievedError:  # random weights need not find anything
        return
    assert found.layer_indices == tuple(compressible_layers(model))


def _line(error: ModelError) -> str:
    line = str(error)
    assert line
    assert "\n" not in line
    return line
