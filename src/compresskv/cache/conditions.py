"""Under which conditions a cache reads a prompt: what the model and the caller settle beforehand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from compresskv.cache.costs import costs_of
from compresskv.models.rotary import Rotations
from compresskv.models.shape import compressible_layers
from compresskv.selection.budgets import Budget
from compresskv.selection.byte_budget import Costs
from compresskv.selection.cuts import Chunks
from compresskv.selection.precision import NATIVE, PRECISIONS, Precision
from compresskv.system.check import check_count


class EvictionObserver(Protocol):
    """Who wants to know when eviction is at work, and when the method is."""

    def evicting(self) -> AbstractContextManager[None]:
        """Around all that happens at the end of a layer's prompt."""

    def scoring_tokens(self) -> AbstractContextManager[None]:
        """Around what the method computes, inside of that."""


class Unobserved:
    """The observer that nothing is told."""

    def evicting(self) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def scoring_tokens(self) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()


@dataclass(frozen=True)
class Conditions:
    """What holds for all layers of one cache; see `CompressedCache`."""

    num_layers: int
    """That are compressed."""
    prompt_tokens: int | None = None
    on_layer: Callable[[int, int], None] | None = None
    observer: EvictionObserver = field(default_factory=Unobserved)
    precision: Precision = PRECISIONS[NATIVE]
    rotations: Rotations | None = None
    """How the model turns queries and keys; None where no method asks."""
    costs: Costs | None = None
    """What bytes are counted by, where the budget is one of bytes."""
    chunks: Chunks | None = None
    """How the prompt is cut while it is read; None: at its end alone."""
    candidates: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no length of a prompt.

        Raises:
            ConfigError: naming it.
        """
        check_count("prompt_tokens", self.prompt_tokens, or_none=True)

    @classmethod
    def of(cls, model: PreTrainedModel, budget: Budget, precision: Precision, **given: Any) -> Conditions:
        """Those of a model.

        Args:
            given: the caller's.
        Raises:
            ConfigError: as above.
            ModelError: the model has no layer that can be compressed.
        """
        costs = costs_of(model, precision) if isinstance(budget, str) else None
        num_layers, rotations = len(compressible_layers(model)), Rotations(model)
        return cls(num_layers, precision=precision, rotations=rotations, costs=costs, **given)

    def of_part(self, model: PreTrainedModel, budget: Budget, num_tokens: int, *, is_first: bool) -> Conditions:
        """Those of the next tokens, which are cut as a prompt of their own.

        Args:
            is_first: whether nothing was read before.
        """
        candidates = self.candidates if is_first else None  # a later part is held beside what may be packed
        own = self.of(model, budget, self.precision, prompt_tokens=num_tokens, candidates=candidates)
        return own if own.costs is None else replace(own, costs=own.costs.of_part(is_first=is_first))
