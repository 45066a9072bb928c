"""A checkpoint's fingerprint is its model's, and is read without loading it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from compresskv.errors import ModelError
from compresskv.models.checkpoint import checkpoint_fingerprint
from compresskv.models.fingerprint import fingerprint


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_as_the_loaded_models(family: str, shard_size: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard_size == "40KB"
    assert checkpoint_fingerprint(tmp_path) == fingerprint(model)


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, tmp_path / "model.safetensors")
    found = checkpoint_fingerprint(tmp_path)
    assert found != fingerprint(model)
    assert found.matches(fingerprint(model)) is False


def test_tensors_of_other_names_or_shapes_tell_nothing(tmp_path: Path) -> None:
    """A quantised checkpoint's: the shape alone is known."""
    model = tiny.tiny_model("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for changed in (
        {f"{name}.packed": weight for name, weight in weights.items()},
        {name: weight[:1].clone() for name, weight in weights.items()},
    ):
        save_file(changed, tmp_path / "model.safetensors")
        found = checkpoint_fingerprint(tmp_path)
        assert found.weights is None
        assert found.matches(fingerprint(model))


def test_damaged_checkpoints(tmp_path: Path) -> None:
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=r"checkpoint cannot be read \(.*header"):
        checkpoint_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"checkpoint cannot be read \(.*no-such-model"):
        checkpoint_fingerprint(tmp_path)


def test_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the sampled weights are read: eight of them."""
    from compresskv.models import checkpoint

    model = tiny.tiny_model("llama")
    model.save_pretrained(tmp_path)
    opened = []
    safe_open = checkpoint.safe_open

    def noting(*args: object, **kwargs: object) -> object:
        opened.append(args)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "safe_open", noting)
    checkpoint_fingerprint(tmp_path)
    assert len(opened) == 1 + 8
    assert torch.get_default_device() == torch.device("cpu")
