"""The positions of our own engine for a model of another family, where one is at hand."""

import os
from pathlib import Path

import pytest
import torch
from engine import SHIPS_LOG, start
from reference import own_positions

import compresskv
from compresskv.models.checkpoint import checkpoint_fingerprint
from compresskv.profiles.profile import Profile
from compresskv.profiles.store import write_profile

MODEL = os.environ.get("COMPRESSKV_DEV_MODEL")


@pytest.mark.slow
@pytest.mark.skipif(MODEL is None, reason="COMPRESSKV_DEV_MODEL names no model: give a folder or a GGUF file")
def test_the_positions_are_our_own_engines(tmp_path: Path) -> None:
    """In float32. The profile is drawn: both engines read the same heads, and that is what counts here."""
    assert MODEL is not None
    model, tokenizer = compresskv.load(MODEL, dtype="float32", device="cpu")
    model.save_pretrained(tmp_path)  # vLLM reads no GGUF files
    tokenizer.save_pretrained(tmp_path)
    num_layers, num_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    scores = torch.rand(num_layers, num_heads, generator=torch.Generator().manual_seed(0)).tolist()
    even = (1 / num_layers,) * num_layers
    heads = tuple(tuple(row) for row in scores)
    profile = Profile(
        "drawn", checkpoint_fingerprint(tmp_path), tuple(range(num_layers)), heads, None, 1, {"even": even}, even
    )
    write_profile(profile, tmp_path / "profile.json")
    text = tokenizer(SHIPS_LOG.read_text(encoding="utf-8"))["input_ids"]
    prompts = [text[:1500], text[2000:2900], text[1000:3311]]
    engines = start({"budget": 150, "profile": str(tmp_path / "profile.json")}, model=str(tmp_path))
    engine = next(engines)
    for prompt in prompts:
        engine.answers([prompt], max_tokens=1)
        assert engine.positions == [own_positions(prompt, "vote", 150, model, profile=tmp_path / "profile.json")]
    engines.close()
