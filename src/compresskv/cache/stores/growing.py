"""A tensor that grows along tokens: room for more is taken at once, so that a new token costs no copy of the old."""

from collections.abc import Sequence

from torch import Tensor

from compresskv.cache.stores.base import Slots, may_write, room_for_tokens


class Growing:
    """Keys or values of one layer, (B, H, n, D), at the front of a tensor with room for more.

    What was handed out is never changed: a branch that shares it may go on reading. So whoever shares or cuts what is
    held must make a new `Growing` of it, whose first token copies.
    """

    def __init__(self, held: Tensor) -> None:
        self._held = held
        self._storage: Tensor | None = None

    def append(self, states: Tensor, room: int) -> Tensor:
        """Add (B, H, T_new, D) and return all that is held, a view; `room` as in `reserve`."""
        start, num_new = self._held.shape[2], states.shape[2]
        self.reserve(num_new, states, room)[:, :, start : start + num_new] = states
        return self.advance(num_new)

    def reserve(self, num_new: int, states: Tensor, room: int) -> Tensor:
        """A tensor (B, H, n + room, D) that begins with what is held and has room for new tokens like `states`.

        Args:
            room: tokens beside the new ones that a new tensor gets room for.
        """
        held = self._held.shape[2]
        if self._storage is None or held + num_new > self._storage.shape[2] or not may_write(self._storage, states):
            batch_size, num_heads, _, head_dim = self._held.shape
            self._storage = self._held.new_empty(batch_size, num_heads, held + num_new + room, head_dim)
            self._storage[:, :, :held] = self._held
            self._storage[:, :, held:] = 0  # a masked slot may be read, and what it holds must be a number
            self._held = self._storage[:, :, :held]  # lets what held it before go
        return self._storage

    def lend(self, room: int) -> "Growing":
        """One that begins with what is held, and grows in the same tensor by up to `room` tokens before it copies."""
        storage = self.reserve(room, self._held, 0)
        storage[:, :, self._held.shape[2] :] = 0  # of the one that had it before: a masked slot must be a number
        lent = Growing(self._held)
        lent._storage = storage
        return lent

    def advance(self, num_new: int) -> Tensor:
        """Count tokens that were written into what `reserve` gave; all that is held then, a view."""
        assert self._storage is not None
        self._held = self._storage[:, :, : self._held.shape[2] + num_new]
        return self._held

    @property
    def held(self) -> Tensor:
        """(B, H, n, D)."""
        return self._held


def reserve_token(keys: Growing, values: Growing, packed: Sequence[Tensor] = ()) -> Slots:
    """Room for one token of one row in both, behind what is packed; see `Store.reserve`."""
    device, num_held = keys.held.device, keys.held.shape[2]
    own, others = (growing.reserve(1, growing.held, room_for_tokens(device)) for growing in (keys, values))
    starts = [head * own.shape[2] for head in range(own.shape[1])]
    return Slots(own, others, starts, [start + num_held for start in starts], packed)
