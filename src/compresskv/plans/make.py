"""Reading a prompt to decide what to keep of it, while its keys and values are freed layer by layer."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compresskv import defaults
from compresskv.attention.pieces import AUTO, PrefillMemory
from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.cache.layer import CompressedLayer
from compresskv.errors import ConfigError, PromptError
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.models.decoding import check_tokens
from compresskv.models.dtype import warn_of_slow_dtype
from compresskv.models.fingerprint import fingerprint
from compresskv.models.load import check_model
from compresskv.plans.capture import read_prompt
from compresskv.plans.plan import LayerPlan, Plan, prompt_digest
from compresskv.profiles.profile import Profile
from compresskv.selection.budgets import Budget, read_budget
from compresskv.selection.precision import NATIVE
from compresskv.selection.select import EMPTY_SLOT
from compresskv.system.check import check_callbacks, is_int
from compresskv.system.libraries import libraries


class PlanningLayer(CompressedLayer):
    """Gives the method what it asks for, frees its keys and values, and notes what it would keep."""

    chosen: Tensor | None = None
    """(B, H, R): what it would keep; None: all."""
    chosen_scores: Tensor | None = None
    """(B, H, R): what each of them was chosen by."""

    def end_prefill(self, *args: Any) -> None:
        """End prefill and free everything."""
        super().end_prefill(*args)
        self.keys = self.values = self.store = None

    def retain(self, tokens: Tensor, scores: Tensor | None = None) -> None:
        """Note the choice; what it names may be freed already."""
        self.chosen = tokens
        if scores is not None:
            scores = scores.expand(-1, tokens.shape[1], -1)
            self.chosen_scores = scores.gather(-1, tokens.clamp(min=0))


class PlanningCache(CompressedCache):
    """Holds one whole layer at a time, and in the end nothing but choices."""

    layer_type = PlanningLayer


def make_plan(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    method: str | Method = defaults.METHOD,
    budget: Budget = defaults.BUDGET,
    *,
    profile: Profile | str | Path | None = None,
    store: str = NATIVE,
    prefill_memory: PrefillMemory = AUTO,
    on_layer: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Plan:
    """Read a prompt and decide what `compressing` with the same method would keep of it.

    Keys and values are freed layer by layer, so memory stays that of one whole layer even for methods that decide for
    all layers together. Reading the prompt again with the plan as method is the bounded way to use those: it costs a
    second prefill. Methods that replay the text hold the full cache while they do.

    Args:
        token_ids: the prompt's.
        method, budget, profile, store, prefill_memory, options: as for `compressing`; the store tells how many tokens
            bytes are.
        on_layer: called with (layers done, layers).
    Raises:
        ConfigError, ProfileError, ModelError: as for `compressing`; or the method looks ahead.
        PromptError: there are no token ids, they are a batch's, or one is none of the model's vocabulary.
    """
    check_model(model)
    check_callbacks(on_layer=on_layer)
    _check_tokens(model, token_ids)
    budget = read_budget(budget)
    chosen = prepare_method(model, method, profile, **options)
    if chosen.lookahead:
        raise ConfigError(f"lookahead={chosen.lookahead}: a plan is made from the prompt alone")
    warn_of_slow_dtype(model)
    with routing(model):
        told: dict[str, Any] = {"prefill_memory": prefill_memory, "on_layer": on_layer, "store": store}
        cache = PlanningCache(model, chosen, budget, candidates=None, **told)
        read_prompt(model, token_ids, cache)
    own = getattr(chosen, "profile", None)
    return Plan(
        model=str(fingerprint(model)),
        num_prompt_tokens=len(token_ids),
        prompt_sha256=prompt_digest(token_ids),
        method=chosen.label,
        budget=budget if isinstance(budget, (int, float, str)) else tuple(budget),
        profile=None if own is None else own.digest,
        layers=tuple(_layer_plan(layer) for layer in cache.compressed_layers),
        auto=next(iter(cache.auto_choices), None),
        versions=libraries(),
    )


def _check_tokens(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    given = isinstance(token_ids, Sequence) and len(token_ids) > 0
    if not given or not all(is_int(token) for token in token_ids):
        raise PromptError("token_ids must be the integers of one prompt: pass input_ids[0].tolist()")
    check_tokens(model, min(token_ids), max(token_ids))


def _layer_plan(layer: CompressedLayer) -> LayerPlan:
    assert isinstance(layer, PlanningLayer)
    num_tokens = layer.num_prompt_tokens
    if layer.chosen is None or layer.chosen_scores is None:
        return LayerPlan(layer.layer_idx, (tuple(range(num_tokens)),), ((None,) * num_tokens,))
    heads = zip(layer.chosen[0].tolist(), layer.chosen_scores[0].tolist(), strict=True)
    chosen = [[pair for pair in zip(*head, strict=True) if pair[0] != EMPTY_SLOT] for head in heads]
    return LayerPlan(
        layer.layer_idx,
        tuple(tuple(position for position, _ in head) for head in chosen),
        tuple(tuple(score if math.isfinite(score) else None for _, score in head) for head in chosen),
    )
