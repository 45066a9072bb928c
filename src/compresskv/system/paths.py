"""Where CompressKV keeps files of its own."""

import os
import tempfile
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder for models and profiles: $COMPRESSKV_CACHE, or the user's cache folder. Not created here."""
    chosen = os.environ.get("COMPRESSKV_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("compresskv")


def try_folder_of(path: Path) -> None:
    """Make the folder that `path` will lie in, and find out whether files can be written there.

    Raises:
        OSError: they cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
