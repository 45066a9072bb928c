"""The profile: head scores and layer errors of one model, with where they came from. One versioned JSON file."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from msgspec import structs

from compresskv.errors import ProfileError
from compresskv.models.fingerprint import Fingerprint
from compresskv.profiles.packing import unpacked
from compresskv.system.check import check_path
from compresskv.system.convert import convert
from compresskv.system.inputs import read_json

FORMAT = "compresskv-profile"
VERSION = 1

RANKS_ALONE = (
    "holds ranks within layers: import head scores, too ('compresskv profile import'), or measure one with "
    "'compresskv profile MODEL'"
)

Rows = tuple[tuple[float, ...], ...]
_NUM_BITS = {"replay_weights": 32, "query_centres": 16}
_LOSSES = ("store_losses", "document_losses")
"""Fields that no method looks into."""
_SHARE = re.compile(r"0\.\d*[1-9]\d*")


class _Model(TypedDict):
    id: str
    fingerprint: Fingerprint


class _Errors(TypedDict):
    sets: dict[str, tuple[float, ...]]
    combined: tuple[float, ...]


class _Parts(TypedDict):
    """What a file holds otherwise than a profile does, or must hold."""

    model: _Model
    layer_errors: _Errors
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """Measurements of a model's full-attention layers, in the order of `layer_indices`."""

    model_id: str
    fingerprint: Fingerprint
    layer_indices: tuple[int, ...]
    """Numbers of the full-attention layers in the model (L of them)."""
    semantic_scores: Rows
    """(L, H_q): mean semantic retrieval score of each query head."""
    traditional_scores: Rows | None
    """(L, H_q): mean traditional retrieval score; None in profiles that were imported without."""
    num_runs: int
    """Runs that the semantic scores are means over; 0 in imported profiles, where they are ranks within a layer."""
    layer_errors_by_set: dict[str, tuple[float, ...]]
    """For each calibration set, (L,) eviction errors, L1-normalised."""
    layer_errors: tuple[float, ...]
    """(L,): mean over the sets, L1-normalised."""
    provenance: dict[str, Any] = field(default_factory=dict)
    replay_weights: tuple[str, ...] | None = None
    """For each layer, what forecasts a replay's attention (`compresskv.selection.forecast`): (H_kv, F) float32 from the
    lowest byte on, in base64; None in profiles of older releases and imported ones."""
    query_centres: tuple[str, ...] | None = None
    """For each layer, where its queries lie before they are turned to their positions (`compresskv.selection.centres`):
    (H_q, 2, D) float16 as above; None in profiles of older releases and imported ones."""
    loss_curves: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For a method's name, (scale, power) of the model's own `LossCurve`, where that was measured."""
    store_losses: dict[str, float] = field(default_factory=dict)
    """For a packed store's name, what it loses in nats per token where all tokens are kept; empty in profiles of older
    releases and imported ones."""
    document_losses: dict[str, float] = field(default_factory=dict)
    """For a share of a document's tokens, such as '0.25', what is lost in nats per token where `forecast` keeps so many
    before the question is known, and nothing is packed; empty where `store_losses` is, and in older releases."""

    def __post_init__(self) -> None:
        """Check that every number is there and can be used.

        Raises:
            ProfileError: naming the field.
        """
        num_layers, num_heads = len(self.layer_indices), self.fingerprint.num_query_heads
        _check(self.num_runs >= 0, "num_runs", f"is {self.num_runs}")
        _check(num_layers > 0, "layer_indices", "is empty")
        ascending = all(a < b for a, b in zip(self.layer_indices, self.layer_indices[1:], strict=False))
        in_model = all(0 <= index < self.fingerprint.num_layers for index in self.layer_indices)
        _check(ascending and in_model, "layer_indices", "is not an ascending list of layers of the model")
        for name in ("semantic_scores", "traditional_scores"):
            rows = getattr(self, name)
            if rows is not None:
                _check(len(rows) == num_layers, name, f"has {len(rows)} layers instead of {num_layers}")
                _check(
                    all(len(row) == num_heads for row in rows),
                    name,
                    f"does not have {num_heads} heads in each layer",
                )
                _check(all(map(_usable, rows)), name, "holds a number that is negative, NaN or infinite")
        for name in ("semantic_scores", *(() if self.num_runs else ("traditional_scores",))):
            rows = getattr(self, name)
            _check(rows is None or any(map(any, rows)), name, "holds only zeros")
        for name, errors in [*self.layer_errors_by_set.items(), ("combined", self.layer_errors)]:
            where = f"layer_errors.{name}"
            _check(len(errors) == num_layers, where, f"has {len(errors)} layers instead of {num_layers}")
            _check(_usable(errors), where, "holds a number that is negative, NaN or infinite")
            _check(abs(math.fsum(errors) - 1) < 1e-3, where, f"sums to {math.fsum(errors):.4f} instead of 1")
        for name, curve in self.loss_curves.items():
            problem = "is not two finite numbers above 0"
            _check(all(0 < number < math.inf for number in curve), f"loss_curves.{name}", problem)
        for field_name in _LOSSES:
            for name, loss in getattr(self, field_name).items():
                _check(0 <= loss < math.inf, f"{field_name}.{name}", "is no finite number of at least 0")
        _check(all(map(_SHARE.fullmatch, self.document_losses)), "document_losses", "names what is no share")
        for name in _NUM_BITS:
            rows = getattr(self, name)
            if rows is not None:
                _check(len(rows) == num_layers, name, f"has {len(rows)} layers instead of {num_layers}")
                finite = all(map(math.isfinite, itertools.chain.from_iterable(self._unpacked(name))))
                _check(finite, name, "holds a number that is NaN or infinite")

    def top_heads(self, layer_idx: int, count: int) -> list[int]:
        """The `count` best semantic retrieval heads of layer `layer_idx` of the model, best first.

        Raises:
            ProfileError: the profile has no such layer.
        """
        scores = self._layer_scores(layer_idx)
        return sorted(range(len(scores)), key=lambda head: -scores[head])[:count]

    def _layer_scores(self, layer_idx: int) -> tuple[float, ...]:
        return self.semantic_scores[self._row(layer_idx)]

    def _row(self, layer_idx: int) -> int:
        try:
            return self.layer_indices.index(layer_idx)
        except ValueError:
            raise ProfileError(f"the profile of {self.model_id} has no layer {layer_idx}") from None

    def layer_error(self, layer_idx: int) -> float:
        """The layer's share of the eviction errors, which sum to 1 over layers.

        Raises:
            ProfileError: the profile has no such layer.
        """
        return self.layer_errors[self._row(layer_idx)]

    def replay_weights_of(self, layer_idx: int) -> tuple[float, ...]:
        """The layer's `replay_weights`, one KV head after another.

        Raises:
            ProfileError: the profile has no such layer, or no such weights.
        """
        return self._unpacked("replay_weights", layer_idx)[0]

    def query_centres_of(self, layer_idx: int) -> tuple[float, ...]:
        """The layer's `query_centres`, one query head after another.

        Raises:
            ProfileError: the profile has no such layer, or no centres.
        """
        return self._unpacked("query_centres", layer_idx)[0]

    def _unpacked(self, name: str, layer_idx: int | None = None) -> list[tuple[float, ...]]:
        """The numbers of all layers, or of one."""
        rows: tuple[str, ...] | None = getattr(self, name)
        _check(rows is not None, name, "is missing")
        assert rows is not None
        chosen = rows if layer_idx is None else [rows[self._row(layer_idx)]]
        try:
            return [unpacked(row, _NUM_BITS[name]) for row in chosen]
        except ValueError as error:
            raise ProfileError(f"field {name!r} {error}") from None

    def ranked_heads(self, scores: Rows) -> list[tuple[int, int]]:
        """All (layer of the model, head), best first by `scores`, one of this profile's two tables."""
        heads = [(row, head) for row in range(len(scores)) for head in range(len(scores[row]))]
        heads.sort(key=lambda place: -scores[place[0]][place[1]])
        return [(self.layer_indices[row], head) for row, head in heads]

    @property
    def comparable_scores(self) -> Rows | None:
        """(L, H_q): scores by which heads of different layers compare; None where there are ranks within layers alone.

        They are the semantic ones where these were measured, and the traditional ones of imported profiles.
        """
        return self.semantic_scores if self.num_runs else self.traditional_scores

    @cached_property
    def best_heads(self) -> list[tuple[int, int]]:
        """All (layer of the model, head), best first by `comparable_scores`.

        Raises:
            ProfileError: there are none.
        """
        return self.ranked_heads(self._comparable)

    @property
    def _comparable(self) -> Rows:
        scores = self.comparable_scores
        if scores is None:
            raise ProfileError(f"the profile of {self.model_id} {RANKS_ALONE}")
        return scores

    def comparable_scores_of(self, layer_idx: int) -> tuple[float, ...]:
        """(H_q,): those of one layer.

        Raises:
            ProfileError: the profile has no such layer, or none.
        """
        return self._comparable[self._row(layer_idx)]

    def kv_head_weights(self, layer_idx: int) -> list[float]:
        """For each KV head of a layer, the best score of the query heads that read it; the model's best is 1.

        Raises:
            ProfileError: as for `comparable_scores_of`.
        """
        scores = self.comparable_scores_of(layer_idx)
        groups = self.fingerprint.num_query_heads // self.fingerprint.num_kv_heads
        best = max(score for row in self._comparable for score in row)
        return [max(scores[head : head + groups]) / best for head in range(0, len(scores), groups)]

    @cached_property
    def digest(self) -> str:
        """12 hex digits that stand for all of the profile that methods look into."""
        own = {name: value for name, value in self.to_dict().items() if name not in _LOSSES}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """As stored."""
        own = json.loads(json.dumps(asdict(self), default=structs.asdict))
        for name in ("loss_curves", "query_centres", *_LOSSES):
            if not own[name]:  # so that files and digests of older releases stay as they are
                del own[name]
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": {"id": own.pop("model_id"), "fingerprint": own.pop("fingerprint")},
            "layer_errors": {"sets": own.pop("layer_errors_by_set"), "combined": own.pop("layer_errors")},
            **own,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Profile":
        """Read what `to_dict` wrote.

        Raises:
            ProfileError: a field is missing, of the wrong kind, or holds numbers that cannot be.
        """
        _check(isinstance(data, dict) and data.get("format") == FORMAT, "format", f"is not {FORMAT!r}")
        version = data.get("version")
        _check(version == VERSION, "version", f"is {version!r}, this release reads {VERSION}")
        try:
            parts = convert(data, _Parts)
            model, errors = parts["model"], parts["layer_errors"]
            flat = {"model_id": model["id"], "fingerprint": model["fingerprint"]}
            flat |= {"layer_errors_by_set": errors["sets"], "layer_errors": errors["combined"]}
            return convert({**data, **flat}, cls)
        except ValueError as error:
            raise ProfileError(str(error)) from error


def read_profile(path: str | Path) -> Profile:
    """Load and check a profile file.

    Raises:
        ProfileError: no such file, no JSON, or not a valid profile; the message names the file.
        ConfigError: no name of a file.
    """
    check_path("profile", path)
    try:
        return Profile.from_dict(read_json(path))
    except FileNotFoundError:
        raise ProfileError("cannot be read: no such file", option="profile", value=str(path)) from None
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror}", option="profile", value=str(path)) from error
    except ValueError as error:  # not JSON, not text
        raise ProfileError(f"is not JSON: {error}", option="profile", value=str(path)) from error
    except ProfileError as error:
        raise ProfileError(f"is no profile: {error}", option="profile", value=str(path)) from error


def _check(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise ProfileError(f"field {name!r} {what}")


def _usable(numbers: Sequence[float]) -> bool:
    return all(math.isfinite(number) and number >= 0 for number in numbers)
