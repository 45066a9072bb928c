"""Keys and values of one layer whose KV heads hold different numbers of tokens: each head has a part of its own."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own short name
from torch import Tensor, nn

from compresskv.attention.plain import AttentionFunction, has_sinks
from compresskv.cache.stores.base import RAGGED, ROOM, Slots, Store, gather_tokens, may_write, room_for_tokens
from compresskv.cache.stores.positions import Positions


class RaggedStore(Store):
    """What each KV head holds, one after another in one tensor. Nothing is padded to the fullest head.

    Each head's part has room for a few more tokens once it has grown, so that a new token copies none of the old ones.
    """

    @property
    def layout(self) -> str:
        """Heads need not hold as many tokens."""
        return RAGGED

    def __init__(self, parts: list[list[Tensor]], held: Positions) -> None:
        """Pack what is given.

        Args:
            parts: keys, then values: of each KV head (B, n, D).
        """
        super().__init__(held)
        self._pack(parts, room=0)

    @classmethod
    def fits(cls, held: Positions) -> bool:
        """Any choice does, and it costs one call of the attention function for each head."""
        return True

    @classmethod
    def gathered(cls, source: Store, held: Positions, slots: Tensor) -> "RaggedStore":
        """See `Store.gathered`."""
        longest = slots.shape[2]
        taken = []
        for head, count in enumerate(held.counts(source.num_heads)):
            own = slots[:, head : head + 1] if slots.shape[1] > 1 else slots
            taken.append([states[:, 0] for states in source.take(own[..., longest - count :], head)])
        return cls([[keys for keys, _ in taken], [values for _, values in taken]], held)

    def take(self, slots: Tensor, head: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Store.take`."""
        counts = self.counts
        longest, taken = max(counts), []
        for number in range(len(counts)) if head is None else [head]:
            own = slots[:, number : number + 1] if slots.shape[1] > 1 else slots
            own = own - (longest - counts[number])
            taken.append(gather_tokens(own, *(self._head(packed, number) for packed in self.tensors)))
        keys, values = (torch.cat(list(states), dim=1) for states in zip(*taken, strict=True))
        return keys, values

    def _pack(self, parts: list[list[Tensor]], room: int) -> None:
        """Lay out heads' (B, n, D) side by side, each with `room` for more tokens."""
        counts = [part.shape[1] for part in parts[0]]
        self._starts = [sum(counts[:head]) + head * room for head in range(len(counts))]
        self._room = room
        self._keys, self._values = packed = [self._packed(own) for own in parts]
        self._shown = [own.new_empty(len(own), len(counts), 0, own.shape[2]) for own in packed]
        ends = [start + count for start, count in zip(self._starts, counts, strict=True)]
        # one by one: a list would be sent to the device, which waits for it
        self._ends = torch.cat([torch.full((1,), end, device=self._keys.device) for end in ends])
        self._shared, self._num_behind = False, 0

    def _packed(self, parts: list[Tensor]) -> Tensor:
        batch_size, _, head_dim = parts[0].shape
        num_slots = sum(part.shape[1] + self._room for part in parts)
        packed = parts[0].new_zeros(batch_size, num_slots, head_dim)  # a masked slot is read, and must be a number
        for part, start in zip(parts, self._starts, strict=True):
            packed[:, start : start + part.shape[1]] = part
        return packed

    def __copy__(self) -> "RaggedStore":
        """A store that goes on from here alone; tensors are shared until it appends."""
        copied = object.__new__(RaggedStore)
        copied.__dict__.update(self.__dict__)
        copied._shared = True
        return copied

    def lend(self, room: int) -> "RaggedStore":
        """See `Store.lend`."""
        self._reserve(room, self._keys, 0)
        for packed in self.tensors:
            for start, count in zip(self._starts, self.counts, strict=True):
                packed[:, start + count : start + count + self._room] = 0
        lent = copy.copy(self)
        lent._shared = False
        return lent

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return len(self._starts)

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """(B, H_kv, 0, D): heads do not lie side by side."""
        keys, values = self._shown
        return keys, values

    @property
    def tensors(self) -> list[Tensor]:
        """(B, sum over heads of what they hold or have room for, D): keys and values."""
        return [self._keys, self._values]

    def _head(self, packed: Tensor, head: int) -> Tensor:
        """(B, 1, n, D), a view."""
        start = self._starts[head]
        return packed[:, None, start : start + self.counts[head]]

    def append(
        self, key_states: Tensor, value_states: Tensor, room: int = ROOM, *, undecided: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens in every head; they alone are given back."""
        num_new, counts = key_states.shape[2], self.counts
        self._reserve(num_new, key_states, room)
        ends = self._find_ends()
        for packed, states in zip(self.tensors, (key_states, value_states), strict=True):
            if num_new == 1:
                packed.index_copy_(1, ends, states[:, :, 0])
            else:
                for head, (start, count) in enumerate(zip(self._starts, counts, strict=True)):
                    packed[:, start + count : start + count + num_new] = states[:, head]
        self._advance(num_new)
        return key_states, value_states

    def _reserve(self, num_new: int, states: Tensor, room: int) -> None:
        """Make room for new tokens like `states` in every head's part."""
        if self._shared or num_new > self._room or not may_write(self._keys, states):
            self._pack(self._parts(lambda part: part), room=num_new + room)

    def _parts(self, function: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
        """What `function` makes of each head's (B, n, D): keys, then values."""
        heads = range(self.num_heads)
        return [[function(self._head(packed, head)[:, 0]) for head in heads] for packed in self.tensors]

    def reserve(self) -> Slots:
        """See `Store.reserve`."""
        self._reserve(1, self._keys, room_for_tokens(self._keys.device))
        ends = [start + count for start, count in zip(self._starts, self.counts, strict=True)]
        return Slots(self._keys, self._values, self._starts, ends)

    def advance(self) -> None:
        """See `Store.advance`."""
        self._advance(1)

    def _advance(self, num_new: int) -> None:
        """Count tokens that were written behind the parts' ends."""
        self._num_behind += num_new
        self._room -= num_new
        self.held = self.held.appended(num_new)

    def _find_ends(self) -> Tensor:
        """(H_kv,) int64: where the next token goes. Recorded steps know it by themselves."""
        if self._num_behind:
            self._ends, self._num_behind = self._ends + self._num_behind, 0
        return self._ends

    def crop(self, num_removed: int) -> None:
        """Forget the last tokens of every head. Their slots are not written again: a branch may still read them."""
        self.held = self.held.appended(-num_removed)
        self._shared = True

    def attend(
        self, attention: AttentionFunction, module: nn.Module, query: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of each KV head's query heads over what it holds, side by side."""
        if has_sinks(module):
            return self._attend_padded(attention, query, mask)
        groups, found = query.shape[1] // self.num_heads, []
        for head in range(self.num_heads):
            own = query[:, head * groups : (head + 1) * groups]
            keys, values = (self._head(packed, head) for packed in self.tensors)
            found.append(attention(own, keys, values, self.held.cut_mask(mask, own, head)))
        return torch.cat([output for output, _ in found], dim=2), _side_by_side([weights for _, weights in found])

    def _attend_padded(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of all heads at once, padded to the fullest for this call: for functions with weights a head."""
        longest = max(self.counts)
        keys, values = (
            torch.cat(
                [F.pad(self._head(packed, head), (0, 0, longest - count, 0)) for head, count in enumerate(self.counts)],
                dim=1,
            )
            for packed in self.tensors
        )
        return attention(query, keys, values, replace(self.held, has_empty_slots=True).cut_mask(mask, query))

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of all that is held."""
        parts = self._parts(function)
        self.held = self.held.of_rows(function)
        self._pack(parts, room=0)

    def state(self) -> dict[str, Tensor]:
        """With keys and values (B, sum over heads of what they hold, D)."""
        keys, values = (torch.cat(parts, dim=1) for parts in self._parts(lambda part: part))
        return {"keys": keys, "values": values, "counts": torch.tensor(self.counts, device="cpu"), **super().state()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "RaggedStore":
        """See `Store.from_state`."""
        counts = state["counts"].tolist()
        parts = [list(state[name].split(counts, dim=1)) for name in ("keys", "values")]
        return cls(parts, cls.positions_from_state(state))


def _side_by_side(weights: list[Tensor | None]) -> Tensor | None:
    """(B, H_q, T, n): of all KV heads (B, G, T, their own n), with zeros before those of heads that hold fewer tokens.

    None where an attention function gives none.
    """
    known = [own for own in weights if own is not None]
    if len(known) < len(weights):
        return None
    longest = max(own.shape[-1] for own in known)
    return torch.cat([F.pad(own, (longest - own.shape[-1], 0)) for own in known], dim=1)
