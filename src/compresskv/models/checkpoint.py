"""The fingerprint of a checkpoint on disk, read without loading the model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compresskv.errors import ModelError, first_line
from compresskv.models.fingerprint import Fingerprint, of_shape, weights_digest
from compresskv.system.inputs import read_json
from compresskv.system.paths import is_file
from compresskv.system.quiet import quiet

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def checkpoint_fingerprint(folder: Path) -> Fingerprint:
    """The same as `fingerprint` of the loaded model: only the sampled weights are read.

    `weights` is None where the files do not hold transformers' parameters as they are (quantised or fused ones).

    Raises:
        ModelError: the folder holds no checkpoint of a decoder-only model, or a damaged one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    builder: Any = AutoModelForCausalLM
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = builder.from_config(config)
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        weights = _digest(folder, shapes)
    except (OSError, ValueError, SafetensorError) as error:
        problem = f": its checkpoint cannot be read ({first_line(error)})"
        raise ModelError(problem, option="model", value=str(folder)) from error
    return of_shape(config.get_text_config(decoder=True), weights)


def is_complete(folder: Path) -> bool:
    """Whether all files are there that hold a checkpoint's tensors: in the hub's cache some may yet have to come."""
    index = folder / _INDEX
    if not is_file(index):
        return is_file(folder / _SINGLE)
    try:
        names = set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return all(is_file(folder / name) for name in names)


def _digest(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """`weights_digest`; None where a sampled weight is missing or has another shape."""
    files = _files(folder)

    def read(name: str) -> Tensor:
        with safe_open(folder / files[name], framework="pt") as file:
            weight: Tensor = file.get_tensor(name)
        if tuple(weight.shape) != shapes[name]:
            raise KeyError(name)
        return weight

    try:
        return weights_digest(shapes, read)
    except KeyError:
        return None


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    index = folder / _INDEX
    if is_file(index):
        files: dict[str, str] = read_json(index)["weight_map"]
        return files
    if not is_file(folder / _SINGLE):
        return {}
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), _SINGLE)
