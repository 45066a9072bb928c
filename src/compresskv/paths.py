"""Where CompressKV keeps files of its own."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder for models and profiles: $COMPRESSKV_CACHE, or the user's cache folder. Not created here."""
    chosen = os.environ.get("COMPRESSKV_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("compresskv")
