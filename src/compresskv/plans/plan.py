"""The plan: which prompt tokens every layer and KV head keeps, written down before anything is evicted."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.errors import PlanError
from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.models.fingerprint import fingerprint
from compresskv.models.shape import compressible_layers
from compresskv.selection.auto_budget import AutoChoice
from compresskv.selection.budgets import Budget, check_budget
from compresskv.system.check import check_path
from compresskv.system.convert import convert
from compresskv.system.files import write_text
from compresskv.system.inputs import read_json

FORMAT = "compresskv-plan"
_MOST_NBYTES = 2**30  # it names each kept token of each layer and head, with its score
VERSION = 1

Positions = tuple[int, ...]
Scores = tuple[float | None, ...]


@dataclass(frozen=True)
class LayerPlan:
    """What one full-attention layer keeps."""

    layer_idx: int
    """The layer's number in the model."""
    positions: tuple[Positions, ...]
    """For each KV head, or once for all of them, the prompt tokens kept, ascending."""
    scores: tuple[Scores, ...]
    """What each was chosen by; None where it is kept whatever its score (recent tokens, sinks, a budget for all)."""


class _Prompt(TypedDict):
    num_tokens: int
    sha256: str


class _Parts(TypedDict):
    """What a file holds otherwise than a plan does (columns, one list where all layers share it), or must hold."""

    prompt: _Prompt
    versions: dict[str, str]
    layers: list[int]
    positions: list[Any]
    scores: list[Any]


@dataclass(frozen=True)
class Plan:
    """What is kept of one prompt, and how that was chosen. Made by `make_plan`.

    Give it to `compressing` in place of a method: the prompt is then cut layer by layer while it is read, so that
    prefill never holds more than one whole layer. Or cut a full cache by it after the fact: `CompressedCache.adopt`.
    """

    model: str
    """Architecture, shape and weights, as in profiles."""
    num_prompt_tokens: int
    prompt_sha256: str
    """Stands for the prompt's token ids; see `prompt_digest`."""
    method: str
    """Name and the options that differ from its defaults."""
    budget: int | float | str | tuple[int, ...]
    profile: str | None
    """Digest of the method's profile."""
    layers: tuple[LayerPlan, ...]
    versions: dict[str, str] = field(default_factory=dict)
    auto: AutoChoice | None = None
    """How much was chosen and why, where the budget is 'auto'."""

    def __post_init__(self) -> None:
        """Check what is about to be kept.

        Raises:
            PlanError: a layer without positions, or positions that are not ascending prompt tokens.
            ConfigError: the budget is none.
        """
        check_budget(self.budget)
        _check(self.num_prompt_tokens > 0 and bool(self.layers), "it has no tokens or no layers")
        indices = [-1, *(layer.layer_idx for layer in self.layers)]
        _check(all(a < b for a, b in pairwise(indices)), "its layers are not ascending numbers of layers")
        for layer in self.layers:
            where = f"layer {layer.layer_idx}"
            _check(bool(layer.positions) and all(layer.positions), f"{where} keeps nothing")
            _check(
                [len(kept) for kept in layer.positions] == [len(scores) for scores in layer.scores],
                f"{where} has not one score for each position",
            )
            known = [score for scores in layer.scores for score in scores if score is not None]
            _check(all(map(math.isfinite, known)), f"{where} has a score that is not finite")
            for kept in layer.positions:
                ascending = all(a < b for a, b in pairwise(kept))
                _check(
                    ascending and kept[0] >= 0 and kept[-1] < self.num_prompt_tokens,
                    f"{where} keeps positions that are not ascending tokens of a prompt of {self.num_prompt_tokens}",
                )

    @cached_property
    def shared_positions(self) -> Positions | None:
        """The one list that every layer and KV head keeps; None where they differ.

        The only form that an engine with one block table for all layers can apply without kernels of its own.
        """
        lists = {kept for layer in self.layers for kept in layer.positions}
        return lists.pop() if len(lists) == 1 else None

    @property
    def mean_retained(self) -> float:
        """Prompt tokens kept, mean over layers and KV heads."""
        means = (sum(map(len, layer.positions)) / len(layer.positions) for layer in self.layers)
        return sum(means) / len(self.layers)

    def check_model(self, layer_indices: Sequence[int], num_kv_heads: int) -> None:
        """Refuse a model whose layers or heads are not those of the plan.

        Args:
            layer_indices: numbers of the model's full-attention layers.
        Raises:
            PlanError: other layers, or a list for another number of KV heads.
        """
        _check([layer.layer_idx for layer in self.layers] == list(layer_indices), "the plan is for other layers")
        for layer in self.layers:
            _check(
                len(layer.positions) in (1, num_kv_heads),
                f"the plan has {len(layer.positions)} lists for the {num_kv_heads} KV heads of layer {layer.layer_idx}",
            )

    def as_method(self, model: PreTrainedModel) -> "Planned":
        """The method that keeps what this plan says.

        Raises:
            PlanError: the plan is of another model.
        """
        own = fingerprint(model)
        if self.model != str(own):
            raise PlanError(f"the plan belongs to another model: it is for {self.model}, this is {own}")
        self.check_model(compressible_layers(model), own.num_kv_heads)
        return Planned(plan=self)

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Refuse another prompt than the plan's.

        Raises:
            PlanError: another number of tokens, or other tokens.
        """
        if len(token_ids) != self.num_prompt_tokens:
            raise PlanError(f"the plan is for a prompt of {self.num_prompt_tokens} tokens, not {len(token_ids)}")
        if prompt_digest(token_ids) != self.prompt_sha256:
            raise PlanError("the plan is for another prompt of the same length")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: one list where all layers share it."""
        own = json.loads(json.dumps(asdict(self)))
        if self.auto is None:  # as before there were any
            del own["auto"]
        layers = own.pop("layers")
        prompt = {"num_tokens": own.pop("num_prompt_tokens"), "sha256": own.pop("prompt_sha256")}
        columns = {name: [layer[name] for layer in layers] for name in ("positions", "scores")}
        if all(len(column[0]) == 1 and all(one == column[0] for one in column) for column in columns.values()):
            columns = {name: column[0][0] for name, column in columns.items()}
        indices = [layer["layer_idx"] for layer in layers]
        return {"format": FORMAT, "version": VERSION, "prompt": prompt, **own, "layers": indices, **columns}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Plan":
        """Read what `to_dict` wrote.

        Raises:
            PlanError: a field is missing, of the wrong kind, or holds what cannot be.
        """
        _check(isinstance(data, dict) and data.get("format") == FORMAT, f"its format is not {FORMAT!r}")
        version = data.get("version")
        _check(version is not True and version == VERSION, f"its version is {version!r}, this release reads {VERSION}")
        try:
            parts = convert(data, _Parts)
            indices, positions, scores = parts["layers"], parts["positions"], parts["scores"]
            if positions and not isinstance(positions[0], list):
                positions, scores = [[positions]] * len(indices), [[scores]] * len(indices)
            _check(len(indices) == len(positions) == len(scores), "it has not positions and scores for each layer")
            names = ("layer_idx", "positions", "scores")
            layers = [dict(zip(names, layer, strict=True)) for layer in zip(indices, positions, scores, strict=True)]
            prompt = parts["prompt"]
            flat = {"num_prompt_tokens": prompt["num_tokens"], "prompt_sha256": prompt["sha256"], "layers": layers}
            return convert({**data, **flat}, cls)
        except ValueError as error:
            raise PlanError(str(error)) from error

    def write(self, path: str | Path) -> None:
        """Save as JSON.

        Raises:
            PlanError: the place cannot be written.
            ConfigError: no name of a file.
        """
        check_path("path", path)
        try:
            write_text(path, json.dumps(self.to_dict()) + "\n")
        except OSError as error:
            raise PlanError(f"cannot write the plan to {str(path)!r}: {error.strerror}") from error


def read_plan(path: str | Path) -> Plan:
    """Load and check a plan.

    Raises:
        PlanError: no such file, no JSON, or no valid plan; the message names the file.
        ConfigError: no name of a file.
    """
    check_path("path", path)
    try:
        return Plan.from_dict(read_json(path, _MOST_NBYTES))
    except OSError as error:
        raise PlanError(f"plan {str(path)!r}: {error.strerror}") from error
    except PlanError as error:
        raise PlanError(f"plan {str(path)!r}: {error}") from error
    except ValueError as error:  # not JSON, not text
        raise PlanError(f"plan {str(path)!r} is not JSON: {error}") from error


def prompt_digest(token_ids: Sequence[int]) -> str:
    """16 hex digits that stand for token ids."""
    return hashlib.sha256(repr([int(token) for token in token_ids]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Planned(Method):
    """Keeps what a plan names. It needs no queries and no profile, and brings its own budgets."""

    name = "plan"
    summary = "what a plan names"
    source = "this project"

    brings_budget = True

    plan: Plan | None = None

    @property
    def cuts_again(self) -> bool:
        """No: it names tokens of the whole prompt."""
        return False

    @property
    def _layers(self) -> tuple[LayerPlan, ...]:
        assert self.plan is not None
        return self.plan.layers

    def resolve_budgets(self, budget: Budget, num_layers: int, num_tokens: int) -> list[list[int]]:
        """As many as the plan names, whatever `budget` is.

        Raises:
            PlanError: the prompt has another length, or the model other layers.
        """
        assert self.plan is not None
        if num_tokens != self.plan.num_prompt_tokens:
            raise PlanError(f"the plan is for a prompt of {self.plan.num_prompt_tokens} tokens, not {num_tokens}")
        if num_layers != len(self._layers):
            raise PlanError(f"the plan is for {len(self._layers)} full-attention layers, the model has {num_layers}")
        return [[len(kept) for kept in layer.positions] for layer in self._layers]

    def score(self, inputs: LayerInputs) -> Tensor:
        """(B, 1 or H_kv, T): 1 for what is kept, else 0."""
        (own,) = (layer for layer in self._layers if layer.layer_idx == inputs.layer_idx)
        batch_size, _, num_tokens, _ = inputs.keys.shape
        scores = torch.zeros(batch_size, len(own.positions), num_tokens, dtype=torch.float32, device=inputs.keys.device)
        starts = [0] * batch_size if inputs.valid is None else inputs.valid.int().argmax(dim=-1).tolist()
        for row, start in enumerate(starts):
            for head, kept in enumerate(own.positions):
                scores[row, head, [start + position for position in kept]] = 1
        return scores


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise PlanError(what)
