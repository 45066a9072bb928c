"""Where CompressKV keeps files of its own, and how paths are looked at: what cannot be looked at is no error."""

import os
import stat
from pathlib import Path

import platformdirs

from compresskv.errors import ConfigError


def cache_dir() -> Path:
    """The folder for models and profiles: $COMPRESSKV_CACHE, or the user's cache folder. Not created here.

    Raises:
        ConfigError: it begins with the name of a user that there is not.
    """
    chosen = os.environ.get("COMPRESSKV_CACHE")
    if not chosen:
        return platformdirs.user_cache_path("compresskv")
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise ConfigError(f"COMPRESSKV_CACHE={chosen!r}: no such user") from None


def home_path(text: str) -> Path:
    """A path with '~' as its user's folder; of a user that there is not, a name like any other, as a shell has it."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; `Path.is_dir` raises where it cannot tell, and so do its siblings."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: str | Path) -> bool:
    """Whether there is a file, as far as can be seen."""
    return stat.S_ISREG(_mode(path))


def exists(path: str | Path) -> bool:
    """Whether anything is there, as far as can be seen."""
    return _mode(path) != 0


def why_unseen(path: str | Path) -> str | None:
    """Why nobody can say whether something is there, in the system's words; None where that can be said.

    The usual reasons are a folder that one may not enter, and a name that is too long.
    """
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL, which no name has
        return None
    except OSError as error:
        return error.strerror
    return None


def _mode(path: str | Path) -> int:
    """0 where nothing is seen, which is no file's mode."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0
