"""When the profile is looked for before vLLM loads the model, and when that is left to the worker."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from compresskv.errors import ModelError, ProfileError
from compresskv.models.checkpoint import is_complete
from compresskv.serving.profiles import check_profile_files
from compresskv.serving.settings import Settings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with org/name in three or more files of weights. Nobody has a profile of it."""
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "own"))
    model = tmp_path / "hub" / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("1", encoding="utf-8")
    tiny.tiny_model("llama").save_pretrained(model / "snapshots" / "1", max_shard_size="40KB")
    return tmp_path / "hub"


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "models--org--name" / "snapshots" / "1").glob("*.safetensors"))


def check_hub(cache: Path) -> None:
    check_profile_files(Settings(100), SimpleNamespace(model="org/name", revision=None), str(cache))


def check_local(cache: Path) -> None:
    folder = str(cache / "models--org--name" / "snapshots" / "1")
    check_profile_files(Settings(100), SimpleNamespace(model=folder, revision=None), None)


def test_all_of_it_is_here(cache: Path) -> None:
    assert len(shards(cache)) > 1
    for check in (check_hub, check_local):
        with pytest.raises(ProfileError, match="no profile of this model"):
            check(cache)


def test_a_part_of_it_is_here(cache: Path) -> None:
    """vLLM has yet to fetch the rest of a hub's model, but never that of a folder."""
    shards(cache)[-1].unlink()
    check_hub(cache)
    with pytest.raises(ModelError, match="cannot be read"):
        check_local(cache)


@pytest.mark.parametrize("other", [None, "pytorch_model.bin"])
def test_no_safetensors_are_here(other: str | None, cache: Path) -> None:
    folder = shards(cache)[0].parent
    for file in (*shards(cache), folder / "model.safetensors.index.json"):
        file.unlink()
    if other is not None:
        (folder / other).touch()
    check_hub(cache)
    with pytest.raises(ProfileError, match=r"no profile can be found by the files of .* hold no safetensors"):
        check_local(cache)


def test_nothing_of_it_is_here(cache: Path) -> None:
    check_hub(cache / "elsewhere")


def test_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert is_complete(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for damaged in ("{", "[]", "{}", '{"weight_map": []}'):
        index.write_text(damaged, encoding="utf-8")
        assert not is_complete(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one", "b": "two"}}), encoding="utf-8")
    (tmp_path / "one").touch()
    assert not is_complete(tmp_path)
    (tmp_path / "two").touch()
    assert is_complete(tmp_path)
