"""The models whose files were published with CompressKV: what they are, and where the files lie."""

import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from compresskv.errors import ProfileError, first_line
from compresskv.models.fingerprint import Fingerprint
from compresskv.system.paths import is_file

_ADDRESS = "https://raw.githubusercontent.com/TUDa-HWAI/CompressKV"
_TIMEOUT_S = 30
_HEADS, _LAYERS, _SCORES = "_head_idx.json", "_layer_score.jsonl", "_head_scores_traditional.json"


@dataclass(frozen=True)
class Published:
    """One such model."""

    hub_id: str
    """By which it is loaded."""
    shape: Fingerprint
    """Known without a download."""
    commit: str
    """Of the authors' repository."""
    has_head_scores: bool
    """Whether raw scores of its heads were published, too."""


_FIRST, _NEWER = "cca1c92f1e7ef3ade17d8967f258355c7e3bf537", "6919c456608dfad2d18124b2475504bf4309fcc1"
PUBLISHED = {
    published.hub_id.partition("/")[2]: published
    for published in (
        Published("meta-llama/Llama-3.1-8B-Instruct", Fingerprint("llama", 32, 32, 8, 128, 128256), _FIRST, True),
        Published("mistralai/Mistral-7B-Instruct-v0.3", Fingerprint("mistral", 32, 32, 8, 128, 32768), _FIRST, True),
        Published("Qwen/Qwen2.5-7B-Instruct", Fingerprint("qwen2", 28, 28, 4, 128, 152064), _NEWER, False),
    )
}


def find_published(name: str) -> Published:
    """The model of that name, with or without the organisation.

    Raises:
        ProfileError: nothing was published for it.
    """
    for short, published in PUBLISHED.items():
        if name in (short, published.hub_id):
            return published
    raise ProfileError(f"is none of {', '.join(PUBLISHED)}", option="published", value=name)


@contextmanager
def published_files(name: str, folder: Path | None = None) -> Iterator[tuple[Path, Path, Path | None]]:
    """A model's ranked heads, layer errors and, where they were published, raw head scores.

    Args:
        folder: where the files lie, NAME_head_idx.json, NAME_layer_score.jsonl and, if it is there,
            NAME_head_scores_traditional.json. None: they are fetched from the authors' repository into a scratch
            folder, which is there inside the `with` alone.
    Raises:
        ProfileError: nothing was published for that model, or a file cannot be fetched.
    """
    published = find_published(name)
    short = published.hub_id.partition("/")[2]
    if folder is not None:
        scores = folder / f"{short}{_SCORES}"
        yield folder / f"{short}{_HEADS}", folder / f"{short}{_LAYERS}", scores if is_file(scores) else None
        return
    base = f"{_ADDRESS}/{published.commit}"
    with tempfile.TemporaryDirectory(prefix="compresskv-") as scratch:
        paths = [Path(scratch) / f"{short}{ending}" for ending in (_HEADS, _LAYERS)]
        for path in paths:
            _fetch(name, f"{base}/scores/{path.name}", path)
        own_scores = Path(scratch) / f"{short}{_SCORES}" if published.has_head_scores else None
        if own_scores is not None:
            _fetch(name, f"{base}/Retrieval_Head_Identification/head_score/{short}.json", own_scores)
        yield paths[0], paths[1], own_scores


def _fetch(name: str, address: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):  # it is the answer itself, and holds its connection
            error.close()
        reason = str(getattr(error, "reason", "")) or first_line(error)
        problem = f": {address} cannot be fetched ({reason}); have its files in a folder and give folder=FOLDER"
        raise ProfileError(problem, option="published", value=name) from error
