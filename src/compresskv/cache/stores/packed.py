"""Keys and values of one layer in few bits a number, whatever each KV head holds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compresskv.attention.plain import AttentionFunction, PlainAttention
from compresskv.cache.stores.base import EVEN, RAGGED, ROOM, Slots, Store, room_for_tokens
from compresskv.cache.stores.dense import DenseStore
from compresskv.cache.stores.first import first_among, first_apart
from compresskv.cache.stores.growing import Growing, reserve_token
from compresskv.cache.stores.packed_reading import attend_to_codes
from compresskv.cache.stores.packed_states import PackedStates
from compresskv.cache.stores.positions import Positions
from compresskv.cache.stores.ragged import RaggedStore

_PARTS = ("codes", "ranges", "centre", "scale")
_WHOLE = "whole"
TAIL = 32
"""New tokens are packed once there are so many."""


class PackedStore(Store):
    """Packed keys and values of each KV head, and as the model gave them its first token and a tail of new tokens.

    Attention unpacks a layer for the length of a call; nothing else ever holds it unpacked.

    Most queries attend to the first token more than to any other, so what packing did to it would be done to all.
    Sources: IntactKV (arXiv 2403.01241), KVSink (arXiv 2508.04257). It lies where the tail begins. Where a row of a
    head holds no token, all are packed.
    """

    def __init__(
        self, keys: PackedStates, values: PackedStates, tail: tuple[Tensor, Tensor], held: Positions, num_whole: int
    ) -> None:
        """Hold these.

        Args:
            tail: keys and values (B, H_kv, num_whole + n, D): each head's first token, and what comes behind what is
                packed.
            num_whole: 1, or 0 where first tokens are packed, too.
        """
        super().__init__(held)
        self._keys, self._values, self._num_whole = keys, values, num_whole
        self._tail = [Growing(states) for states in tail]
        self._bounds: Tensor | None = None

    @property
    def layout(self) -> str:
        """Of what is packed; the tail is even."""
        return EVEN if len(set(self._keys.counts)) == 1 else RAGGED

    @classmethod
    def fits(cls, held: Positions) -> bool:
        """Any choice does."""
        return True

    @classmethod
    @torch.no_grad()
    def gathered(cls, source: Store, held: Positions, slots: Tensor) -> "PackedStore":
        """See `Store.gathered`. What is packed in the same way already is not packed anew."""
        longest, counts = slots.shape[2], held.counts(source.num_heads)
        own = [_of_head(slots, head)[..., longest - count :] for head, count in enumerate(counts)]
        if isinstance(source, cls):
            return source._regathered(held, own)
        taken = [source.take(one, head) for head, one in enumerate(own)]
        empty, num_whole = held.empty_slots(source.num_heads), min(held.fewest, 1)
        packed, first = [], []
        for side, bits in enumerate(cls._bits()):
            parts = [first_apart(pair[side][:, 0], own, num_whole) for pair, own in zip(taken, empty, strict=True)]
            used = [_used(rest, own) for (_, rest), own in zip(parts, empty, strict=True)]
            packed.append(PackedStates.of([rest for _, rest in parts], used, bits, are_keys=side == 0))
            first.append(torch.stack([one for one, _ in parts], dim=1))
        return cls(packed[0], packed[1], (first[0], first[1]), held, num_whole)

    @classmethod
    def _bits(cls) -> tuple[int, int]:
        """Of keys and of values."""
        bits = cls.precision.key_bits, cls.precision.value_bits
        assert bits[0] is not None
        assert bits[1] is not None
        return bits[0], bits[1]

    def _regathered(self, held: Positions, slots: list[Tensor]) -> "PackedStore":
        """The named slots of each head, (B, 1, R) in terms of `explicit`."""
        counts, num_whole = self.counts, min(held.fewest, 1)
        before, after = (one.empty_slots(len(counts)) for one in (self.held, held))
        packed = self._packed_whole(first=not num_whole)
        first: list[list[Tensor]] = [[], []]
        rest = []
        for head, (one, count) in enumerate(zip(slots, counts, strict=True)):
            own = one[:, 0] - (max(counts) - count)
            own_first, own_rest = first_apart(own, after[head], num_whole)
            rest.append(self._place(own_rest, before[head], packed[0].counts[head]))
            for number, side in enumerate(packed):
                first[number].append(self._taken(side, self._tail[number].held[:, head], head, own_first, before[head]))
        keys, values = (side.gathered(rest) for side in packed)
        tail_keys, tail_values = (torch.stack(states, dim=1) for states in first)
        return type(self)(keys, values, (tail_keys, tail_values), held, num_whole)

    def _packed_whole(self, *, first: bool = False) -> tuple[PackedStates, PackedStates]:
        """With the tail and, where `first`, with first tokens behind it."""
        tails, num = [growing.held.detach() for growing in self._tail], self._num_whole if first else 0
        keys, values = (torch.cat([tail[:, :, self._num_whole :], tail[:, :, :num]], dim=2) for tail in tails)
        return self._keys.extended(keys), self._values.extended(values)

    @torch.no_grad()
    def _pack_tail(self) -> None:
        """Once it is long enough. What was read before it keeps its codes."""
        device = self._tail[0].held.device
        if self._num_unpacked >= (TAIL if device.type == "cpu" else room_for_tokens(device)):
            self._keys, self._values = self._packed_whole()
            self._bounds = None
            self._tail = [Growing(growing.held[:, :, : self._num_whole].clone()) for growing in self._tail]

    @property
    def _num_unpacked(self) -> int:
        """New tokens."""
        return self._tail[0].held.shape[2] - self._num_whole

    def take(self, slots: Tensor, head: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Store.take`: unpacked."""
        return self._opened(back=True).take(slots, head)

    def append(
        self, key_states: Tensor, value_states: Tensor, room: int = ROOM, *, undecided: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens behind the tail, which is packed first where it is long; they alone are given back."""
        if not undecided:
            self._pack_tail()
        for growing, states in zip(self._tail, (key_states, value_states), strict=True):
            growing.append(states, room)
        self.held = self.held.appended(key_states.shape[2])
        return key_states, value_states

    def attend(
        self, attention: AttentionFunction, module: nn.Module, query: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Plain attention of one token reads codes; else the layer is unpacked for this call.

        What is turned is multiplied by turned queries.
        """
        if isinstance(attention, PlainAttention) and self._reads_codes(query, mask):
            keys, values = (growing.held for growing in self._tail)
            return attend_to_codes(self._keys, self._values, (keys, values), query, attention.scaling), None
        query = self._keys.turned_queries(query)
        output, weights = self._opened(back=False).attend(attention, module, query, mask)
        return self._values.turned_output(output), weights

    def _reads_codes(self, query: Tensor, mask: Tensor | None) -> bool:
        """Whether these queries are one token's, which sees all that is held, and need no gradient."""
        needs_grad = torch.is_grad_enabled() and any(one.requires_grad for one in (query, self._tail[0].held))
        return query.shape[2] == 1 and not needs_grad and self.held.cut_mask(mask, query) is None

    def _opened(self, *, back: bool) -> Store:
        """A store of the same, unpacked: turned as it is stored or, with `back`, as it was given."""
        sides, num = ((self._keys, self._tail[0].held), (self._values, self._tail[1].held)), self._num_whole
        if self.layout == EVEN and not back and not self.held.has_empty_slots:
            keys, values = (packed.even(tail[:, :, :num], tail[:, :, num:]) for packed, tail in sides)
            return DenseStore(keys, values, self.held)
        empty = self.held.empty_slots(self.num_heads)
        parts = []
        for packed, tail in sides:
            around = (tail if back else packed.turned_states(tail)).unbind(dim=1)
            heads = zip(around, packed.heads(back=back), empty, strict=True)
            parts.append(
                [first_among(own[:, :num], one.to(own.dtype), own[:, num:], slots) for own, one, slots in heads]
            )
        if self.layout == EVEN:
            return DenseStore(torch.stack(parts[0], dim=1), torch.stack(parts[1], dim=1), self.held)
        return RaggedStore(parts, self.held)

    def _place(self, slots: Tensor, empty: Tensor | None, num_packed: int) -> Tensor:
        """(B, n) where in `_packed_whole` of a head the tokens of these slots lie; any place for what lies nowhere.

        Args:
            slots: any for what holds nothing.
            empty: see `first_apart`.
            num_packed: tokens of the head there.
        """
        places = slots
        if self._num_whole:
            first = _first_slot(empty)
            places = torch.where(slots == first, num_packed - 1, slots - (slots > first).long())
        return places.clamp(min=0, max=max(0, num_packed - 1))

    def _taken(self, side: PackedStates, tail: Tensor, head: int, slots: Tensor, empty: Tensor | None) -> Tensor:
        """(B, R, D) of a head's slots (B, R), unpacked where they are packed.

        Args:
            side: keys or values with all later tokens.
            tail: (B, 1 + t, D), the head's, which begins with its first token.
        """
        if not slots.shape[1] or not side.counts[head]:
            return tail[:, : slots.shape[1]]
        packed = side.taken(head, self._place(slots, empty, side.counts[head])).to(tail.dtype)
        if not self._num_whole:
            return packed
        return torch.where((slots == _first_slot(empty))[..., None], tail[:, :1], packed)

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return len(self._keys.counts)

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """(B, H_kv, 0, D): what is packed cannot be shown."""
        keys, values = (growing.held[:, :, :0] for growing in self._tail)
        return keys, values

    @property
    def tensors(self) -> list[Tensor]:
        """Codes, ranges and means of keys and of values; the tail of both."""
        return [*self._keys.tensors, *self._values.tensors, *(growing.held for growing in self._tail)]

    def reserve(self) -> Slots:
        """See `Store.reserve`: in the tail."""
        self._pack_tail()
        if self._bounds is None:
            ends = torch.tensor([0, *self._keys.counts], device="cpu").cumsum(0)
            self._bounds = ends.to(self._tail[0].held.device)
        keys, values = self._tail
        return reserve_token(keys, values, [*self._keys.tensors, *self._values.tensors, self._bounds])

    def advance(self) -> None:
        """See `Store.advance`."""
        self.held = self.held.appended(1)
        for growing in self._tail:
            growing.advance(1)

    def crop(self, num_removed: int) -> None:
        """Forget the last tokens, packed ones too."""
        self.held = self.held.appended(-num_removed)
        left = max(0, self._num_unpacked - num_removed)
        packed = num_removed - (self._num_unpacked - left)
        self._tail = [Growing(growing.held[:, :, : self._num_whole + left]) for growing in self._tail]
        if packed:
            self._keys, self._values = self._keys.cropped(packed), self._values.cropped(packed)
            self._bounds = None

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of all that is held."""
        self.held = self.held.of_rows(function)
        self._keys, self._values = self._keys.map_rows(function), self._values.map_rows(function)
        self._tail = [Growing(function(growing.held)) for growing in self._tail]

    def __copy__(self) -> "PackedStore":
        """A store that goes on from here alone; tensors are shared until it appends."""
        keys, values = (growing.held for growing in self._tail)
        return type(self)(self._keys, self._values, (keys, values), self.held, self._num_whole)

    def state(self) -> dict[str, Tensor]:
        """With the codes, ranges and means of keys and of values, and what lies beside them, (B, H_kv, n, D)."""
        counts, whole = (torch.tensor(number, device="cpu") for number in (self._keys.counts, bool(self._num_whole)))
        state = {"packed": counts, _WHOLE: whole, **super().state()}
        sides = (("keys", self._keys, self._tail[0]), ("values", self._values, self._tail[1]))
        for name, packed, growing in sides:
            state |= {f"{name}.{part}": tensor for part, tensor in packed.state().items()}
            state[f"{name}.tail"] = growing.held.contiguous()
        return state

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "PackedStore":
        """See `Store.from_state`."""
        counts = state["packed"].tolist()
        keys, values = (
            PackedStates.from_state(
                {part: state[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in state},
                counts,
                bits,
            )
            for name, bits in zip(("keys", "values"), cls._bits(), strict=True)
        )
        num_whole = int(state[_WHOLE]) if _WHOLE in state else 0  # earlier releases packed the first token, too
        tail = state["keys.tail"], state["values.tail"]
        return cls(keys, values, tail, cls.positions_from_state(state), num_whole)


def _of_head(slots: Tensor, head: int) -> Tensor:
    """(B, 1, R) of (B, 1 or H, R)."""
    return slots[:, head : head + 1] if slots.shape[1] > 1 else slots


def _used(rest: Tensor, empty: Tensor | None) -> Tensor | None:
    """(B, n) bool, which of a head's slots (B, n, D), but for the first token's, hold something; None: all."""
    return None if empty is None else torch.arange(rest.shape[1], device=rest.device) >= empty[:, None]


def _first_slot(empty: Tensor | None) -> Tensor | int:
    """(B, 1) of each row's first token, or of all rows'; see `first_apart`."""
    return 0 if empty is None else empty[:, None]
