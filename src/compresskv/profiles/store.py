"""Where profiles lie: an explicit file, the user's cache, those shipped with the package."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compresskv.errors import ProfileError
from compresskv.models.fingerprint import Fingerprint, fingerprint
from compresskv.profiles.profile import Profile, read_profile
from compresskv.system.files import make_folder, try_place, write_text
from compresskv.system.paths import cache_dir, is_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QUICK = ".quick.json"
_SHIPPED = Path(__file__).parent / "shipped"


def resolve_profile(
    model: PreTrainedModel, profile: Profile | str | Path | None = None, *, for_method: bool = False
) -> Profile:
    """The profile to use with `model`: the given one, else the user's own, else a shipped one.

    Damaged files are skipped with a warning, but for the one that bears this model's name: another in its place would
    change results unnoticed.

    Raises:
        ModelError: the model cannot be used with a compressed cache.
        ProfileError: none fits, the model's own is damaged, or the given one belongs to another model (both
            fingerprints are named).
    """
    from compresskv.attention.routing import check_routable

    check_routable(model)
    return profile_for(
        fingerprint(model), str(getattr(model.config, "_name_or_path", "") or "MODEL"), profile, for_method=for_method
    )


def profile_for(
    own: Fingerprint, model_id: str, profile: Profile | str | Path | None = None, *, for_method: bool = False
) -> Profile:
    """`resolve_profile` for a model that is known by its fingerprint.

    Args:
        model_id: the name by which an imported profile may know the model, and error messages do.
        for_method: whether another method would do, too, where there is none.
    Raises:
        ProfileError: as for `resolve_profile`.
    """
    if profile is not None:
        given = profile if isinstance(profile, Profile) else read_profile(profile)
        if not given.fingerprint.matches(own):
            raise ProfileError(
                f"the profile of {given.model_id} belongs to another model: "
                f"its fingerprint is {given.fingerprint}, this model's is {own}"
            )
        return given
    imported = None
    for path in profile_files():
        try:
            found = _read_once(path)
        except ProfileError as error:
            if path.name == default_path(own).name:
                hint = f"delete it or make it again with 'compresskv profile {model_id}'"
                raise ProfileError(f"{path} {error.problem}: {hint}") from error
            warnings.warn(f"{path} {error.problem}: skipped", stacklevel=2)
            continue
        if found.fingerprint == own:
            return found
        if found.fingerprint.weights is None and found.model_id == model_id and found.fingerprint.matches(own):
            imported = imported or found
    if imported is not None:  # it knows the model by name and shape alone: any measured one is better
        return imported
    ways = [f"make one with 'compresskv profile {model_id}'", "give one as profile=FILE"]
    ways += ["choose a method that needs none, such as 'snapkv'"] * for_method
    told = f"{', '.join(ways[:-1])}{',' * (len(ways) > 2)} or {ways[-1]}"
    raise ProfileError(f"no profile of this model ({own}): {told}")


def _read_once(path: Path) -> Profile:
    """`read_profile`, of a file that has not changed since the last time without reading it again."""
    try:
        stat = path.stat()
    except OSError:
        return read_profile(path)  # tells why
    return _read_version(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@functools.lru_cache(maxsize=64)
def _read_version(path: Path, _mtime_ns: int, _size: int, _inode: int) -> Profile:
    return read_profile(path)


def profile_files() -> Iterator[Path]:
    """The user's profiles, then the shipped ones, then the user's quick ones, which are rougher."""
    folder = user_folder()
    users = sorted(folder.glob("*.json")) if is_folder(folder) else []
    yield from (path for path in users if not path.name.endswith(_QUICK))
    yield from sorted(_SHIPPED.glob("*.json"))
    yield from (path for path in users if path.name.endswith(_QUICK))


def user_folder() -> Path:
    """Where `compresskv profile` keeps its results."""
    return cache_dir() / "profiles"


def default_path(model_fingerprint: Fingerprint, *, quick: bool = False) -> Path:
    """The file of a model's profile in the user's cache; a quick one never takes the place of a full one."""
    return user_folder() / f"{model_fingerprint}{_QUICK if quick else '.json'}"


def stored_profiles() -> Iterator[Profile]:
    """All that are stored, the user's first; damaged files are skipped with a warning."""
    for path in profile_files():
        try:
            yield read_profile(path)
        except ProfileError as error:
            warnings.warn(f"{path} {error.problem}: skipped", stacklevel=2)


def check_profile_place(path: Path) -> None:
    """Find out before long work whether `path` can be written.

    Raises:
        ProfileError: it cannot.
    """
    if is_folder(path):
        raise ProfileError(f"cannot write the profile to {str(path)!r}: it is a folder")
    try:
        try_place(path)
    except OSError as error:
        raise ProfileError(f"cannot write the profile to {str(path)!r}: {error.strerror}") from error


def write_profile(profile: Profile, path: Path) -> None:
    """Write atomically: a reader sees the old file or the new one.

    Raises:
        ProfileError: the place cannot be written.
    """
    try:
        make_folder(path.parent)
        write_text(path, json.dumps(profile.to_dict(), indent=1) + "\n")
    except OSError as error:
        raise ProfileError(f"cannot write the profile to {str(path)!r}: {error.strerror}") from error
