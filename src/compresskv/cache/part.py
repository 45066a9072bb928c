"""A document that is read in parts: each is cut by itself, beside what was kept of those before it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compresskv.cache.held import Holding
from compresskv.selection.select import EMPTY_SLOT

_NUM_SINKS = 4
"""First tokens that outlast others where nothing is known of a document's tokens but their places."""


class Remembering(Holding, Protocol):
    """A cache layer as a part sees it."""

    strengths: Tensor | None
    """(B, 1 or H_kv, R) uint8: see `Part`."""


@dataclass(frozen=True)
class Part:
    """What a layer reads next, behind `start` tokens of which it kept some.

    Scores of several parts cannot be compared: each was shared out among its own tokens. So what is remembered of a
    token that was kept is its strength: the share of its KV head's tokens, of the same part, that it outscored. Where
    less of the earlier parts may stay, the weakest go.
    """

    start: int
    left: float = 1.0
    """How much of what is held of earlier parts stays in each KV head."""
    ranked: bool = False
    """Whether strengths are remembered."""
    replayed: Tensor | None = None
    """As in `LayerInputs`."""


@dataclass(frozen=True)
class PartOf:
    """A layer to whoever cuts one part of it; see `Retaining`. Tokens count from the part's beginning."""

    layer: Remembering
    part: Part

    def retain(self, tokens: Tensor, scores: Tensor | None = None) -> None:
        """Keep the named tokens beside what was kept before."""
        layer, part = self.layer, self.part
        assert layer.store is not None
        held = layer.store.positions
        num_tokens = layer.store.held.num_seen - part.start
        old = held[..., : max(0, held.shape[2] - num_tokens)]  # of a first part, some may be freed already
        old_strengths = _known(layer.strengths, old, part.start)
        if part.left < 1:
            old = _strongest(old, old_strengths, part.left)
        later = torch.where(tokens == EMPTY_SLOT, tokens, tokens + part.start)
        kept, order = _side_by_side(old, later).sort(dim=-1)
        layer.retain(kept)
        if part.ranked and layer.store.held.chosen is not None:
            strengths = _by_place(tokens, num_tokens) if scores is None else _by_rank(tokens, scores)
            num_kept = layer.store.held.chosen.shape[2]
            layer.strengths = _side_by_side(old_strengths, strengths).gather(-1, order)[..., -num_kept:]

    def hold(self, tokens: Tensor) -> None:
        """Of a first part, which has none before it: see `Retaining`."""
        self.layer.hold(tokens)


def _by_rank(tokens: Tensor, scores: Tensor) -> Tensor:
    """(B, H, R) uint8, of what was chosen by scores (B, 1 or H, T)."""
    chosen_by = scores.float().expand(-1, tokens.shape[1], -1).gather(-1, tokens.clamp(min=0))
    chosen_by = chosen_by.masked_fill(tokens == EMPTY_SLOT, -torch.inf)
    ranks = chosen_by.argsort(dim=-1, stable=True).argsort(dim=-1)
    num_empty = (tokens == EMPTY_SLOT).sum(dim=-1, keepdim=True)
    return _levels((ranks - num_empty + 1) / (tokens.shape[2] - num_empty))


def _strongest(positions: Tensor, strengths: Tensor, share: float) -> Tensor:
    """The strongest of each KV head's tokens, at least one; empty slots in place of the others."""
    used = positions != EMPTY_SLOT
    ranks = strengths.int().masked_fill(~used, -1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    stays = used & (ranks < (used.sum(dim=-1, keepdim=True) * share).floor().clamp(min=1))
    return torch.where(stays, positions, EMPTY_SLOT)


def _known(strengths: Tensor | None, positions: Tensor, num_tokens: int) -> Tensor:
    """Those of all positions: what was kept whole, without a choice, has them by place."""
    by_place = _by_place(positions, num_tokens)
    if strengths is None:
        return by_place
    known = strengths.expand(-1, positions.shape[1], -1)
    return torch.cat([known, by_place[..., known.shape[2] :]], dim=-1)


def _by_place(positions: Tensor, num_tokens: int) -> Tensor:
    """Where there is nothing else to go by, later tokens outlast earlier ones, but for the first few."""
    return _levels(torch.where(positions < _NUM_SINKS, 1.0, (positions + 1) / max(1, num_tokens)))


def _levels(shares: Tensor) -> Tensor:
    """Shares in 256 steps."""
    return (shares.clamp(0, 1) * 255).round().to(torch.uint8)


def _side_by_side(old: Tensor, new: Tensor) -> Tensor:
    """(B, H, R) of (B, 1 or H, R) each."""
    num_heads = max(old.shape[1], new.shape[1])
    return torch.cat([one.expand(-1, num_heads, -1) for one in (old, new)], dim=-1)
