"""Keys and values of one layer whose KV heads hold equal numbers of tokens: one tensor of each."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from compresskv.attention.plain import AttentionFunction
from compresskv.cache.stores.base import EVEN, ROOM, Slots, Store, gather_tokens
from compresskv.cache.stores.growing import Growing, reserve_token
from compresskv.cache.stores.positions import Positions


class DenseStore(Store):
    """(B, H_kv, n, D) keys and values."""

    @property
    def layout(self) -> str:
        """All heads hold as many tokens."""
        return EVEN

    def __init__(self, keys: Tensor, values: Tensor, held: Positions | None = None) -> None:
        """Hold these; every token from the first on where `held` says nothing else."""
        super().__init__(Positions(range(keys.shape[2])) if held is None else held)
        self._keys, self._values = Growing(keys), Growing(values)

    @classmethod
    def fits(cls, held: Positions) -> bool:
        """Whether all heads need as many slots."""
        return len(set(held.fullest)) == 1

    @classmethod
    def gathered(cls, source: Store, held: Positions, slots: Tensor) -> "DenseStore":
        """See `Store.gathered`."""
        return cls(*source.take(slots), held)

    def take(self, slots: Tensor, head: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Store.take`."""
        part = slice(None) if head is None else slice(head, head + 1)
        keys, values = gather_tokens(slots, *(states[:, part] for states in self.states))
        return keys, values

    def append(
        self, key_states: Tensor, value_states: Tensor, room: int = ROOM, *, undecided: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens; all that is held then, views."""
        self.held = self.held.appended(key_states.shape[2])
        return self._keys.append(key_states, room), self._values.append(value_states, room)

    def attend(
        self, attention: AttentionFunction, module: nn.Module, query: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One call over all heads."""
        return attention(query, *self.states, self.held.cut_mask(mask, query))

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, H_kv, n, D)."""
        return self._keys.held, self._values.held

    @property
    def tensors(self) -> list[Tensor]:
        """Both."""
        return list(self.states)

    def reserve(self) -> Slots:
        """See `Store.reserve`."""
        return reserve_token(self._keys, self._values)

    def advance(self) -> None:
        """See `Store.advance`."""
        self.held = self.held.appended(1)
        self._keys.advance(1)
        self._values.advance(1)

    def crop(self, num_removed: int) -> None:
        """Forget the last tokens. Their slots are not written again: a branch may still read them."""
        self.held = self.held.appended(-num_removed)
        self._hold(lambda states: states[:, :, : states.shape[2] - num_removed])

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of all that is held."""
        self.held = self.held.of_rows(function)
        self._hold(function)

    def _hold(self, function: Callable[[Tensor], Tensor]) -> None:
        self._keys, self._values = (Growing(function(states)) for states in self.states)

    def __copy__(self) -> "DenseStore":
        """A store that goes on from here alone; tensors are shared until it appends."""
        return DenseStore(*self.states, self.held)

    def lend(self, room: int) -> "DenseStore":
        """See `Store.lend`."""
        lent = copy.copy(self)
        lent._keys, lent._values = self._keys.lend(room), self._values.lend(room)
        return lent

    def state(self) -> dict[str, Tensor]:
        """With keys and values (B, H_kv, n, D)."""
        keys, values = (states.contiguous() for states in self.states)
        return {"keys": keys, "values": values, **super().state()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "DenseStore":
        """See `Store.from_state`."""
        return cls(state["keys"], state["values"], cls.positions_from_state(state))
