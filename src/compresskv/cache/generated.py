"""What the layers of one cache share while an answer is generated that is cut, too."""

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own short name
from torch import Tensor

from compresskv import defaults
from compresskv.cache.conditions import Conditions
from compresskv.cache.eviction import Eviction
from compresskv.cache.group import checked_scores
from compresskv.cache.held import HeldOf, Holding
from compresskv.cache.stores.base import Store
from compresskv.cache.window import QueryWindow
from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.selection.cuts import Cut, DecodeBudget
from compresskv.selection.select import EMPTY_SLOT, tokens_at


class Generating(Holding, Protocol):
    """A cache layer as it is seen here."""

    layer_idx: int
    seen_tokens: int


class GeneratedEviction:
    """Cuts what layers hold to a budget, once every so many tokens."""

    def __init__(self, method: Method, decode: DecodeBudget, conditions: Conditions) -> None:
        """Nothing is generated yet.

        Args:
            method: see `check_decoding`.
            conditions: of the prompt; who watches its cut is told of those to come.
        """
        self._rotations, self._observer = conditions.rotations, conditions.observer
        self.label, self._budget = method.label, decode.budget
        self.interval = decode.interval
        self.method = method.with_window(method.window_at(decode.budget))
        together = Conditions(conditions.num_layers, observer=conditions.observer)
        self._together = Eviction(method, decode.budget, together) if method.decides_together else None

    @property
    def window_size(self) -> int:
        """So many of the last queries are looked at."""
        return self.method.num_observed()

    def cut(self, layer: Generating, position: int, window: QueryWindow, valid: Tensor | None) -> bool:
        """Cut one layer: now or, where the method decides for all layers together, when the last one has come.

        Args:
            position: the layer's number among the full-attention layers.
            valid: (B, seen) bool, False at padding; None where nothing is padded.
        Returns: whether it holds too much.
        """
        store = layer.store
        assert store is not None
        if max(store.counts) <= self._budget:
            return False
        if self._together is None:
            with self._observer.evicting():
                groups = self._inputs(layer, store, window, valid)
                layer.retain(_side_by_side([self._chosen(inputs, positions) for inputs, positions in groups]))
            return True
        ((inputs, _),) = self._inputs(layer, store, window, valid)  # the method keeps the same tokens in all heads
        cut = Cut(layer.seen_tokens, inputs.num_tokens, self._budget)
        self._together.end_of_prompt(HeldOf(layer), position, inputs, cut=cut)
        return True

    def _inputs(
        self, layer: Generating, store: Store, window: QueryWindow, valid: Tensor | None
    ) -> list[tuple[LayerInputs, Tensor]]:
        groups = _groups(layer, store, window, valid)
        if self.method.turns_ahead:
            assert self._rotations is not None
            ahead = self._rotations.ahead(layer.layer_idx, layer.seen_tokens, window.queries, valid)
            groups = [(replace(inputs, ahead=ahead), positions) for inputs, positions in groups]
        return groups

    def _chosen(self, inputs: LayerInputs, positions: Tensor) -> Tensor:
        """(B, 1 or h, R): what some KV heads keep of the tokens at `positions` (B, 1 or h, n)."""
        batch_size, num_tokens = len(positions), inputs.num_tokens
        lengths = [num_tokens - start for start in inputs.row_starts]
        with self._observer.scoring_tokens():
            scores = self.method.score(inputs)
        shape = (batch_size, inputs.keys.shape[1], num_tokens)
        scores = checked_scores(scores, shape, self.method, option="decode_method")
        slots = Method.select(self.method, scores, [[self._budget]] * batch_size, lengths)
        return tokens_at(slots, positions)


def check_decoding(method: Method, prompt_method: Method, decode: DecodeBudget) -> None:
    """Refuse numbers that cannot work, and a method that cannot cut what another one keeps of a prompt.

    Raises:
        ConfigError: naming what is wrong.
    """
    if not method.evicts:
        raise ConfigError("keeps every token: use a method that evicts", option="decode_method", value=method.label)
    if not method.cuts_again:
        problem = "must see all tokens at once: use another method"
        raise ConfigError(problem, option="decode_method", value=method.label)
    instead = f"use decode_method={defaults.DECODE_METHODS[-1]!r}"
    if method.decides_together and not method.shares_positions:
        problem = f"shares one budget among all layers, which answers are not cut by: {instead}"
        raise ConfigError(problem, option="decode_method", value=method.label)
    alike = prompt_method.shares_heads or prompt_method.shares_positions or not prompt_method.evicts
    does = None
    if method.decides_together and not prompt_method.shares_positions:
        does = "decides for all layers together"
    elif method.shares_heads and not alike:
        does = "chooses by some heads for all KV heads of a layer"
    if does is not None:
        others = f"method {prompt_method.label!r} keeps others in each"
        problem = f"{does}, which must hold the same tokens, but {others}: {instead}"
        raise ConfigError(problem, option="decode_method", value=method.label)
    decode.check(method.window_size)


def _groups(
    layer: Generating, store: Store, window: QueryWindow, valid: Tensor | None
) -> list[tuple[LayerInputs, Tensor]]:
    """KV heads that hold as many tokens of each row, all at once or one by one, and the positions of their tokens."""
    held, counts = store.positions, store.counts
    alike = len(set(counts)) == 1 and held.shape[1] == 1
    if not alike and len(set(counts)) == 1:
        alike = valid is None and not store.held.has_empty_slots
    if alike:
        slots = torch.arange(held.shape[2], device=held.device).expand(len(held), 1, -1)
        parts, positions = [store.take(slots)], [held]
    else:
        parts = store.heads()
        by_head = held.expand(-1, len(counts), -1)
        positions = [by_head[:, [head], held.shape[2] - count :] for head, count in enumerate(counts)]
    num_groups = window.queries.shape[1] // len(counts)
    found, first = [], 0
    for (keys, values), own in zip(parts, positions, strict=True):
        heads = slice(first * num_groups, (first + keys.shape[1]) * num_groups)
        inputs = LayerInputs(
            layer.layer_idx,
            window.queries[:, heads],
            keys,
            values,
            window.scaling,
            window.softcap,
            _used(own, valid),
            first_head=heads.start,
            sinks=None if window.sinks is None else window.sinks[heads],
        )
        found.append((inputs, own))
        first += keys.shape[1]
    return found


def _used(positions: Tensor, valid: Tensor | None) -> Tensor | None:
    """(B, n) bool: False at what holds no token, or padding; None where all do."""
    first = positions[:, 0]
    used = first != EMPTY_SLOT
    if valid is not None:
        used &= valid.gather(-1, first.clamp(min=0))
    return None if bool(used.all()) else used


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """(B, H, R) of (B, 1 or h, R) each; what keeps fewer begins with `EMPTY_SLOT`."""
    longest = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (longest - part.shape[2], 0), value=EMPTY_SLOT) for part in parts], dim=1)
