"""A layer of which some tokens were evicted before, to whoever cuts what is left of it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compresskv.cache.stores.base import Store
from compresskv.selection.select import tokens_at


class Holding(Protocol):
    """A cache layer as it is seen here."""

    store: Store | None

    def retain(self, tokens: Tensor, scores: Tensor | None = None) -> None:
        """See `Retaining`."""

    def hold(self, tokens: Tensor) -> None:
        """See `Retaining`."""


@dataclass(frozen=True)
class HeldOf:
    """See `Retaining`. Tokens count among those that are held."""

    layer: Holding

    def retain(self, tokens: Tensor, scores: Tensor | None = None) -> None:
        """Keep the named ones of what is held, by their true positions."""
        self.layer.retain(self._positions(tokens))

    def hold(self, tokens: Tensor) -> None:
        """See `Retaining`."""
        self.layer.hold(self._positions(tokens))

    def _positions(self, tokens: Tensor) -> Tensor:
        assert self.layer.store is not None
        return tokens_at(tokens, self.layer.store.positions)
