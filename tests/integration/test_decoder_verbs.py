"""What the commands do, with one model of each kind whose layers or attention are unusual."""

from pathlib import Path

import pytest
import torch

import compresskv
import planted
import shrunk
import tiny
from compresskv.calibration.find import find_profile
from compresskv.calibration.settings import CalibrationSettings
from compresskv.errors import ModelError, ProfileError
from compresskv.explain.retention import explain
from compresskv.methods.snapkv import SnapKV
from compresskv.models.shape import compressible_layers
from compresskv.profiles.profile import Profile

TYPES = ["gpt_oss", "gemma4_text", "gemma3n_text", "llama4", "qwen3_next", "lfm2_moe", "qwen2_5_vl"]


def saved(model_type: str, folder: Path) -> Path:
    """A model and its tokenizer, as a user has them."""
    if model_type not in shrunk.types():
        pytest.skip("these transformers do not know it")
    try:
        model = shrunk.build(model_type, vocab_size=600, num_positions=4096)
    except AttributeError as error:  # of a config that lacks what its own model asks for
        pytest.skip(f"these transformers cannot build it: {error}")
    model.save_pretrained(folder)
    planted.bytes_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", TYPES)
def test_ask_explain_and_profile_run(model_type: str, tmp_path: Path) -> None:
    model, tokenizer = compresskv.load(str(saved(model_type, tmp_path)), device="cpu")
    document = " ".join(planted.haystack_sentences(20))
    prompt = torch.arange(60)[None] % 50
    try:
        profile = tiny.random_profile(model)
        for options in ({"profile": profile}, {"profile": profile, "two_pass": True}, {"method": "snapkv"}):
            answer = compresskv.ask(model, tokenizer, document, "What?", budget=24, max_new_tokens=4, **options)
            assert 1 <= answer.stats.generated_tokens <= 4
            assert 0 < answer.stats.retained_fraction < 0.5
        told = explain(model, tokenizer, prompt, SnapKV(), 24, max_new_tokens=2)
        assert [layer.layer_idx for layer in told.retention.layers] == compressible_layers(model)
    except ModelError as error:
        assert str(error).endswith("newer transformers may have none")  # noqa: PT017 - other versions go on
        return
    settings = CalibrationSettings(lengths=(256,), depths=(50,), num_rotations=1, max_new_tokens=8, error_documents=1)
    try:
        found: Profile = find_profile(model, tokenizer, "tiny", tmp_path / "runs", settings).profile
        assert found.layer_indices == tuple(compressible_layers(model))
    except ProfileError as error:
        assert "retriev" in str(error)  # noqa: PT017 - random weights need not find anything
