"""Where profiles are looked for, in which order, and what happens to damaged ones."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import LlamaConfig, LlamaForCausalLM

from compresskv.attention.routing import routing
from compresskv.errors import ModelError, ProfileError
from compresskv.models.fingerprint import Fingerprint, fingerprint
from compresskv.profiles import profile, store
from compresskv.profiles.profile import Profile, read_profile
from compresskv.profiles.store import (
    default_path,
    profile_files,
    resolve_profile,
    stored_profiles,
    user_folder,
    write_profile,
)
from compresskv.system import paths


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def own(model: LlamaForCausalLM) -> Fingerprint:
    return fingerprint(model)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user's cache, and an empty folder of shipped profiles; the latter is returned."""
    monkeypatch.setenv("COMPRESSKV_CACHE", str(tmp_path / "cache"))
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(store, "_SHIPPED", shipped)
    return shipped


def make_profile(of: Fingerprint, name: str) -> Profile:
    """`name` tells where it was found."""
    rows = ((1.0, 2.0), (0.0, 1.0))
    return Profile("org/model", of, (0, 1), rows, None, 3, {"a": (0.5, 0.5)}, (0.5, 0.5), {"name": name})


def found(model: LlamaForCausalLM, profile: Profile | str | Path | None = None) -> str:
    return str(resolve_profile(model, profile).provenance["name"])


class TestOrder:
    def test_explicit_then_user_then_shipped(
        self, model: LlamaForCausalLM, own: Fingerprint, folders: Path, tmp_path: Path
    ) -> None:
        write_profile(make_profile(own, "shipped"), folders / "a.json")
        assert found(model) == "shipped"
        write_profile(make_profile(own, "user"), default_path(own))
        assert found(model) == "user"
        write_profile(make_profile(own, "explicit"), tmp_path / "mine.json")
        assert found(model, tmp_path / "mine.json") == "explicit"
        assert found(model, str(tmp_path / "mine.json")) == "explicit"
        assert found(model, make_profile(own, "object")) == "object"

    def test_profiles_of_other_models_are_passed_over(self, model: LlamaForCausalLM, own: Fingerprint) -> None:
        for index in range(3):
            other = replace(own, weights=f"000000000000000{index}")
            write_profile(make_profile(other, "other"), default_path(other))
        write_profile(make_profile(own, "own"), user_folder() / "zzz.json")
        assert found(model) == "own"

    def test_none_fits(self, model: LlamaForCausalLM, own: Fingerprint) -> None:
        write_profile(make_profile(replace(own, weights="f" * 16), "other"), user_folder() / "other.json")
        with pytest.raises(ProfileError, match=r"'compresskv profile .*profile=FILE$") as caught:
            resolve_profile(model)
        assert str(own) in str(caught.value)
        assert "\n" not in str(caught.value)


class TestForeign:
    def test_both_fingerprints_are_named(self, model: LlamaForCausalLM, own: Fingerprint, tmp_path: Path) -> None:
        other = fingerprint(tiny_llama(seed=1))
        write_profile(make_profile(other, "other"), tmp_path / "other.json")
        for given in (make_profile(other, "other"), tmp_path / "other.json"):
            with pytest.raises(ProfileError, match="org/model belongs to another model") as caught:
                resolve_profile(model, given)
            assert str(own) in str(caught.value)
            assert str(other) in str(caught.value)

    def test_an_explicit_file_that_is_damaged_is_not_replaced(
        self, model: LlamaForCausalLM, own: Fingerprint, tmp_path: Path
    ) -> None:
        write_profile(make_profile(own, "user"), default_path(own))
        (tmp_path / "mine.json").write_text("{", encoding="utf-8")
        with pytest.raises(ProfileError, match=r"mine\.json"):
            resolve_profile(model, tmp_path / "mine.json")


class TestImported:
    """Profiles made from published head scores know the shape, and the model by its name only."""

    def test_explicit_is_taken_by_its_shape(self, model: LlamaForCausalLM, own: Fingerprint) -> None:
        assert found(model, make_profile(replace(own, weights=None), "imported")) == "imported"
        with pytest.raises(ProfileError, match="another model"):
            resolve_profile(model, make_profile(replace(own, weights=None, vocab_size=41), "imported"))

    def test_found_by_the_models_name(
        self, model: LlamaForCausalLM, own: Fingerprint, folders: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_profile(make_profile(replace(own, weights=None), "imported"), folders / "imported.json")
        with pytest.raises(ProfileError, match="no profile of this model"):
            resolve_profile(model)  # the same shape is not the same model
        monkeypatch.setattr(model.config, "_name_or_path", "org/model")
        assert found(model) == "imported"


class TestDamaged:
    """A damaged file stops the model that it would be the profile of, and no other."""

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b'{"format": "compresskv-profile", "version": 99}'])
    def test_another_models_is_skipped_with_a_warning(
        self, model: LlamaForCausalLM, own: Fingerprint, folders: Path, content: bytes
    ) -> None:
        user_folder().mkdir(parents=True)
        damaged = user_folder() / "aaa.json"
        damaged.write_bytes(content)
        write_profile(make_profile(own, "shipped"), folders / "a.json")
        with pytest.warns(UserWarning, match=r"aaa\.json.*skipped") as caught:
            assert found(model) == "shipped"
        assert len(caught) == 1

    def test_the_list_goes_on_after_one(self, own: Fingerprint) -> None:
        for name in ("a", "c"):
            write_profile(make_profile(own, name), user_folder() / f"{name}.json")
        (user_folder() / "b.json").write_text("{", encoding="utf-8")
        with pytest.warns(UserWarning, match=r"b\.json.*skipped"):
            assert [profile.provenance["name"] for profile in stored_profiles()] == ["a", "c"]

    def test_a_folder_of_that_name_is_skipped(self, model: LlamaForCausalLM, own: Fingerprint, folders: Path) -> None:
        (user_folder() / "aaa.json").mkdir(parents=True)
        write_profile(make_profile(own, "shipped"), folders / "a.json")
        with pytest.warns(UserWarning, match=r"aaa\.json.*skipped"):
            assert found(model) == "shipped"

    def test_the_models_own_is_an_error(self, model: LlamaForCausalLM, own: Fingerprint, folders: Path) -> None:
        """Another profile in its place would change results without a word."""
        write_profile(make_profile(own, "shipped"), folders / "a.json")
        default_path(own).parent.mkdir(parents=True)
        default_path(own).write_text("{", encoding="utf-8")
        with pytest.raises(ProfileError, match="delete it or make it again with 'compresskv profile ") as caught:
            resolve_profile(model)
        assert str(default_path(own)) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_none_fits_beside_a_damaged_one(self, model: LlamaForCausalLM) -> None:
        user_folder().mkdir(parents=True)
        (user_folder() / "aaa.json").write_text("{", encoding="utf-8")
        with (
            pytest.warns(UserWarning, match=r"aaa\.json"),
            pytest.raises(ProfileError, match="no profile of this model"),
        ):
            resolve_profile(model)


def test_models_that_cannot_be_compressed_are_refused_first(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.model.layers[0].self_attn, "is_causal", False)
    with pytest.raises(ModelError, match="reads in both directions"):
        resolve_profile(model)


def test_a_file_is_read_again_only_when_it_has_changed(
    model: LlamaForCausalLM, own: Fingerprint, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = default_path(own), []
    write_profile(make_profile(own, "first"), path)
    read_json = profile.read_json

    def counted(path: Path) -> Any:
        read.append(path.name)
        return read_json(path)

    monkeypatch.setattr(profile, "read_json", counted)
    assert [found(model), found(model)] == ["first"] * 2
    assert read == [path.name]
    write_profile(make_profile(own, "second"), path)
    assert [found(model), found(model)] == ["second"] * 2
    assert read == [path.name] * 2
    path.unlink()
    with pytest.raises(ProfileError, match="no profile of this model"):
        found(model)


def test_a_profile_is_found_inside_an_open_context(model: LlamaForCausalLM, own: Fingerprint) -> None:
    """Contexts may nest: the model's attention is ours already."""
    write_profile(make_profile(own, "user"), default_path(own))
    with routing(model):
        assert found(model) == "user"


class TestFolders:
    def test_the_environment_names_the_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert user_folder() == tmp_path / "cache" / "profiles"
        monkeypatch.setenv("COMPRESSKV_CACHE", "~/elsewhere")
        assert paths.cache_dir() == Path.home() / "elsewhere"

    @pytest.mark.parametrize("value", ["", None])
    def test_without_it_the_users_cache(self, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
        if value is None:
            monkeypatch.delenv("COMPRESSKV_CACHE")
        else:
            monkeypatch.setenv("COMPRESSKV_CACHE", value)
        assert paths.cache_dir().name == "compresskv"
        assert paths.cache_dir().is_absolute()

    def test_no_folder_is_no_profile(self, tmp_path: Path) -> None:
        assert list(profile_files()) == []
        assert not (tmp_path / "cache").exists()

    def test_the_cache_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("text", encoding="utf-8")
        assert list(profile_files()) == []

    def test_shipped_profiles_are_profiles(self) -> None:
        for path in sorted((Path(store.__file__).parent / "shipped").glob("*.json")):
            read_profile(path)


class TestWrite:
    def test_makes_the_folder_and_leaves_nothing_beside_it(self, own: Fingerprint) -> None:
        path = default_path(own)
        write_profile(make_profile(own, "first"), path)
        write_profile(make_profile(own, "second"), path)
        assert list(path.parent.iterdir()) == [path]
        assert read_profile(path).provenance == {"name": "second"}
        assert path.read_text(encoding="utf-8").endswith("}\n")

    def test_a_failure_leaves_the_old_file(self, own: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> None:
        path = default_path(own)
        write_profile(make_profile(own, "old"), path)

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ProfileError, match="No space left on device"):
            write_profile(make_profile(own, "new"), path)
        assert list(path.parent.iterdir()) == [path]
        assert read_profile(path).provenance == {"name": "old"}

    def test_an_interruption_leaves_the_old_file(self, own: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> None:
        path = default_path(own)
        write_profile(make_profile(own, "old"), path)

        def interrupted(self: Path, target: Path) -> None:
            assert read_profile(self).provenance == {"name": "new"}  # whole before it takes the old one's place
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_profile(make_profile(own, "new"), path)
        assert list(path.parent.iterdir()) == [path]
        assert read_profile(path).provenance == {"name": "old"}

    def test_a_half_written_file_is_not_taken_for_a_profile(
        self, own: Fingerprint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def look(self: Path, target: Path) -> None:
            assert list(profile_files()) == []

        monkeypatch.setattr(Path, "replace", look)
        write_profile(make_profile(own, "new"), default_path(own))

    def test_others_may_read_it(self, own: Fingerprint) -> None:
        """A cache that a team shares: the umask decides, not the temporary file's 0600."""
        path = default_path(own)
        write_profile(make_profile(own, "shared"), path)
        plain = path.with_name("plain")
        plain.touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    @pytest.mark.parametrize("place", ["file/profile.json", "folder"])
    def test_a_place_that_cannot_be_written(self, own: Fingerprint, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_text("text", encoding="utf-8")
        (tmp_path / "folder").mkdir()
        with pytest.raises(ProfileError, match="cannot write the profile to ") as caught:
            write_profile(make_profile(own, "new"), tmp_path / place)
        assert str(tmp_path / place) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "shipped"]
