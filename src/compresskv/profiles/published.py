"""Profiles from the files that were published with CompressKV: ranked heads per layer, errors per data set.

So users of those models need not calibrate. The files hold ranks, not scores, and nothing that identifies the
weights: an imported profile is taken on the model's name and shape. Raw traditional scores, where there are any, say
how heads of different layers compare.
"""

import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compresskv.errors import ModelError, ProfileError, first_line
from compresskv.models.fingerprint import Fingerprint, of_shape
from compresskv.models.hub import is_reachable
from compresskv.profiles.authors import PUBLISHED
from compresskv.profiles.layer_errors import combined, l1_normalised
from compresskv.profiles.profile import Profile, Rows
from compresskv.system.inputs import read_json
from compresskv.system.paths import is_folder
from compresskv.system.quiet import quiet

_AVERAGE = "avg_score"
_KIND = "traditional"


def import_published(heads: Path, layers: Path, model_id: str, head_scores: Path | None = None) -> Profile:
    """A profile from published files.

    Args:
        heads: JSON, {layer: [query heads, best first]}.
        layers: JSON, {data set: [error of each layer], "avg_score": [...]}; `avg_score` is computed where missing.
        model_id: the hub id or folder that the model is loaded by.
        head_scores: JSON, raw traditional retrieval scores: {"layer-head": [score of each run]}, or their means as
            {"kind": "traditional", "runs": number, "mean": {"layer-head": score}}; every head once.
    Raises:
        ProfileError: a file is missing, malformed, or they disagree; the message names the file.
        ModelError: the model's shape is neither known nor to be had from the hub.
    """
    rankings = _read_rankings(heads)
    errors = _read_errors(layers, len(rankings))
    num_heads = len(rankings[0])
    average = errors.pop(_AVERAGE, None)
    by_set = {name: l1_normalised(row) for name, row in errors.items()}
    provenance: dict[str, Any] = {
        "imported_from": [path.name for path in (heads, layers, head_scores) if path is not None],
        "semantic_scores": "ranks within each layer, 1 for the best head: not comparable across layers",
    }
    traditional: Rows | None = None
    if head_scores is not None:
        traditional, provenance["traditional_runs"] = _read_scores(head_scores, len(rankings), num_heads)
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
        traditional_scores=traditional,
        num_runs=0,
        layer_errors_by_set=by_set,
        layer_errors=l1_normalised(average) if average is not None else combined(by_set),
        provenance=provenance,
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


def _read_scores(path: Path, num_layers: int, num_heads: int) -> tuple[Rows, int | None]:
    """Mean scores (L, H_q), and how many runs they are over, if the file says it."""
    data = _read_json("head_scores", path)
    runs = None
    try:
        if "mean" in data:
            if data.get("kind", _KIND) != _KIND:
                raise ProfileError(f"holds {data['kind']!r} scores", option="head_scores", value=str(path))
            means = {str(place): float(score) for place, score in data["mean"].items()}
            runs = None if data.get("runs") is None else int(data["runs"])
        else:
            means = {place: math.fsum(scores) / len(scores) for place, scores in data.items()}
            runs = min(map(len, data.values()))
    except (AttributeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        problem = "holds no numbers for each 'layer-head'"
        raise ProfileError(problem, option="head_scores", value=str(path)) from error
    if set(means) != {f"{layer}-{head}" for layer in range(num_layers) for head in range(num_heads)}:
        problem = f"does not score each of {num_heads} heads in {num_layers} layers once, as the heads have them"
        raise ProfileError(problem, option="head_scores", value=str(path))
    if not all(math.isfinite(score) and score >= 0 for score in means.values()) or not any(means.values()):
        problem = "holds a number that is negative, NaN or infinite, or zeros alone"
        raise ProfileError(problem, option="head_scores", value=str(path))
    return tuple(tuple(means[f"{layer}-{head}"] for head in range(num_heads)) for layer in range(num_layers)), runs


def _read_json(option: str, path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except OSError as error:
        raise ProfileError(f": {error.strerror}", option=option, value=str(path)) from error
    except ValueError as error:
        raise ProfileError(f"is not JSON: {error}", option=option, value=str(path)) from error
    if not isinstance(data, dict) or not data:
        raise ProfileError("holds no table", option=option, value=str(path))
    return data


def _shape(model_id: str) -> Fingerprint:
    known = PUBLISHED.get(Path(model_id).name)
    if known is not None:
        return known.shape
    try:
        with quiet():
            # False, not the default: that asks on the terminal whether a checkpoint's own code may run.
            is_local = is_folder(model_id) or not is_reachable(model_id)
            source = {"trust_remote_code": False, "local_files_only": is_local}
            config = AutoConfig.from_pretrained(model_id, **source).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        problem = f": its shape cannot be read ({first_line(error)})"
        raise ModelError(problem, option="model", value=model_id) from error
    return of_shape(config, None)
