"""Profiles from the files that were published with CompressKV: ranked heads per layer, errors per data set.

So users of those models need not calibrate. The files hold ranks, not scores, and nothing that identifies the
weights: an imported profile is taken on the model's name and shape.
"""

import json
import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compresskv.errors import ModelError, ProfileError, first_line
from compresskv.models.fingerprint import Fingerprint, of_shape
from compresskv.profiles.profile import Profile, combined, l1_normalised
from compresskv.system.quiet import quiet

_AVERAGE = "avg_score"


# Known without a download: the two models whose files were published.
_KNOWN = {
    "Llama-3.1-8B-Instruct": Fingerprint("llama", 32, 32, 8, 128, 128256),
    "Mistral-7B-Instruct-v0.3": Fingerprint("mistral", 32, 32, 8, 128, 32768),
}


def import_published(heads: Path, layers: Path, model_id: str) -> Profile:
    """A profile from a pair of published files.

    Args:
        heads: JSON, {layer: [query heads, best first]}.
        layers: JSON, {data set: [error of each layer], "avg_score": [...]}; `avg_score` is computed where missing.
        model_id: the hub id or folder that the model is loaded by.
    Raises:
        ProfileError: a file is missing, malformed, or they disagree; the message names the file.
        ModelError: the model's shape is neither known nor to be had from the hub.
    """
    rankings = _read_rankings(heads)
    errors = _read_errors(layers, len(rankings))
    num_heads = len(rankings[0])
    average = errors.pop(_AVERAGE, None)
    by_set = {name: l1_normalised(row) for name, row in errors.items()}
    shape = _shape(model_id)
    if (len(rankings), num_heads) != (shape.num_layers, shape.num_query_heads):
        problem = (
            f"ranks {num_heads} heads in {len(rankings)} layers, but model={model_id!r} has "
            f"{shape.num_query_heads} in {shape.num_layers}"
        )
        raise ProfileError(problem, option="heads", value=str(heads))
    return Profile(
        model_id=model_id,
        fingerprint=shape,
        layer_indices=tuple(range(len(rankings))),
        semantic_scores=tuple(_scores_of_ranks(ranking) for ranking in rankings),
        traditional_scores=None,
        num_runs=0,
        layer_errors_by_set=by_set,
        layer_errors=l1_normalised(average) if average is not None else combined(by_set),
        provenance={
            "imported_from": [heads.name, layers.name],
            "semantic_scores": "ranks within each layer, 1 for the best head: not comparable across layers",
        },
    )


def _scores_of_ranks(ranking: list[int]) -> tuple[float, ...]:
    scores = [0.0] * len(ranking)
    for rank, head in enumerate(ranking):
        scores[head] = 1 - rank / len(ranking)
    return tuple(scores)


def _read_rankings(path: Path) -> list[list[int]]:
    data = _read_json("heads", path)
    try:
        rankings = [[int(head) for head in data[str(layer)]] for layer in range(len(data))]
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError("holds no ranked list for each layer from 0 on", option="heads", value=str(path)) from error
    num_heads = len(rankings[0])
    for layer, ranking in enumerate(rankings):
        if sorted(ranking) != list(range(num_heads)):
            problem = f": layer {layer} does not rank each of {num_heads} heads once"
            raise ProfileError(problem, option="heads", value=str(path))
    return rankings


def _read_errors(path: Path, num_layers: int) -> dict[str, list[float]]:
    data = _read_json("layers", path)
    try:
        errors = {str(name): [float(error) for error in row] for name, row in data.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ProfileError("holds no list of numbers for each data set", option="layers", value=str(path)) from error
    for name, row in errors.items():
        if len(row) != num_layers:
            problem = f": {name} has {len(row)} layers, the heads have {num_layers}"
            raise ProfileError(problem, option="layers", value=str(path))
        if not all(math.isfinite(error) and error >= 0 for error in row):
            problem = f": {name} holds a number that is negative, NaN or infinite"
            raise ProfileError(problem, option="layers", value=str(path))
    return errors


def _read_json(option: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f": {error.strerror}", option=option, value=str(path)) from error
    except ValueError as error:
        raise ProfileError(f"is not JSON: {error}", option=option, value=str(path)) from error
    if not isinstance(data, dict) or not data:
        raise ProfileError("holds no table", option=option, value=str(path))
    return data


def _shape(model_id: str) -> Fingerprint:
    known = _KNOWN.get(Path(model_id).name)
    if known is not None:
        return known
    try:
        with quiet():
            # False, not the default: that asks on the terminal whether a checkpoint's own code may run.
            config = AutoConfig.from_pretrained(model_id, trust_remote_code=False).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        problem = f": its shape cannot be read ({first_line(error)})"
        raise ModelError(problem, option="model", value=model_id) from error
    return of_shape(config, None)
