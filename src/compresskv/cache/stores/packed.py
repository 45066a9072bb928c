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
from compresskv.selection.precision import PRECISIONS

_PARTS = ("codes", "ranges", "centre", "scale")
_WHOLE = "whole"
TAIL = 32
"""New tokens are packed once there are so many."""


class PackedStore(Store):
    """Packed keys and values of each KV head, and as the model gave them its first token and a tail of new tokens.

    Attention unpacks a layer for the length of a call; nothing else ever holds it unpacked.

    Most queries attend to the first token more than to any other, so what packing did to it would be done to all.
    Sources: IntactKV (arXiv 2403.01241), KVSink (arXiv 2508.04257). It lies where the tail begins: whatever it is that
    heads hold, each has one.
    """

    def __init__(self, keys: PackedStates, values: PackedStates, tail: tuple[Tensor, Tensor], held: Positions) -> None:
        """Hold these; `tail`, keys and values (B, H_kv, 1 + n, D): each head's first token, and what comes behind what
        is packed.
        """
        super().__init__(held)
        self._keys, self._values = keys, values
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
        empty = held.empty_slots(source.num_heads)
        packed, first = [], []
        for side, bits in enumerate(cls._bits()):
            parts = [first_apart(pair[side][:, 0], own) for pair, own in zip(taken, empty, strict=True)]
            used = [_used(rest, own) for (_, rest), own in zip(parts, empty, strict=True)]
            packed.append(PackedStates.of([rest for _, rest in parts], used, bits, are_keys=side == 0))
            first.append(torch.stack([one for one, _ in parts], dim=1))
        return cls(packed[0], packed[1], (first[0], first[1]), held)

    @classmethod
    def _bits(cls) -> tuple[int, int]:
        """Of keys and of values."""
        bits = cls.precision.key_bits, cls.precision.value_bits
        assert bits[0] is not None
        assert bits[1] is not None
        return bits[0], bits[1]

    def _regathered(self, held: Positions, slots: list[Tensor]) -> "PackedStore":
        """The named slots of each head, (B, 1, R) in terms of `explicit`."""
        counts, opened = self.counts, self._opened(back=True)
        before, after = (one.empty_slots(len(counts)) for one in (self.held, held))
        first, rest = [], []
        for head, (one, count) in enumerate(zip(slots, counts, strict=True)):
            own_first, own_rest = first_apart(one[:, 0], after[head])
            first.append(opened.take(own_first[:, None], head))
            rest.append(_packed_place(own_rest - (max(counts) - count), before[head], count - 1))
        keys, values = (side.gathered(rest) for side in self._packed_whole())
        tail_keys, tail_values = (torch.cat(states, dim=1) for states in zip(*first, strict=True))
        return type(self)(keys, values, (tail_keys, tail_values), held)

    def _packed_whole(self) -> tuple[PackedStates, PackedStates]:
        """With the tail, without the first token."""
        keys, values = (growing.held[:, :, 1:].detach() for growing in self._tail)
        return self._keys.extended(keys), self._values.extended(values)

    @torch.no_grad()
    def _pack_tail(self) -> None:
        """Once it is long enough. What was read before it keeps its codes."""
        device = self._tail[0].held.device
        if self._num_unpacked >= (TAIL if device.type == "cpu" else room_for_tokens(device)):
            self._keys, self._values = self._packed_whole()
            self._bounds = None
            self._tail = [Growing(growing.held[:, :, :1].clone()) for growing in self._tail]

    @property
    def _num_unpacked(self) -> int:
        """New tokens."""
        return self._tail[0].held.shape[2] - 1

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
        sides = ((self._keys, self._tail[0].held), (self._values, self._tail[1].held))
        if self.layout == EVEN and not back and not self.held.has_empty_slots:
            keys, values = (packed.even(tail[:, :, :1], tail[:, :, 1:]) for packed, tail in sides)
            return DenseStore(keys, values, self.held)
        empty = self.held.empty_slots(self.num_heads)
        parts = []
        for packed, tail in sides:
            around = (tail if back else packed.turned_states(tail)).unbind(dim=1)
            heads = zip(around, packed.heads(back=back), empty, strict=True)
            parts.append([first_among(own[:, :1], one.to(own.dtype), own[:, 1:], slots) for own, one, slots in heads])
        return RaggedStore(parts, self.held)

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
        self._tail = [Growing(growing.held[:, :, : 1 + left]) for growing in self._tail]
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
        return type(self)(self._keys, self._values, (keys, values), self.held)

    def state(self) -> dict[str, Tensor]:
        """With the codes, ranges and means of keys and of values, and the first token and tail (B, H_kv, 1 + n, D)."""
        counts, whole = (torch.tensor(number, device="cpu") for number in (self._keys.counts, 1))
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
        held, tail = cls.positions_from_state(state), [state["keys.tail"], state["values.tail"]]
        if _WHOLE not in state:  # an earlier release packed the first token, too
            empty = held.empty_slots(len(counts))
            parts = [_apart(side, empty) for side in (keys, values)]
            tail = [torch.cat([first.to(own.dtype), own], dim=2) for (first, _), own in zip(parts, tail, strict=True)]
            keys, values = (rest for _, rest in parts)
        return cls(keys, values, (tail[0], tail[1]), held)


class Int8Store(PackedStore):
    """Keys and values in 8 bits."""

    precision = PRECISIONS["int8"]


class Int4Store(PackedStore):
    """Keys and values in 4 bits."""

    precision = PRECISIONS["int4"]


class Int2Store(PackedStore):
    """Keys and values in 2 bits."""

    precision = PRECISIONS["int2"]


class Int4K8Store(PackedStore):
    """Keys in 8 bits, values in 4."""

    precision = PRECISIONS["int4k8"]


def _of_head(slots: Tensor, head: int) -> Tensor:
    """(B, 1, R) of (B, 1 or H, R)."""
    return slots[:, head : head + 1] if slots.shape[1] > 1 else slots


def _used(rest: Tensor, empty: Tensor | None) -> Tensor | None:
    """(B, n) bool, which of a head's tokens but the first (B, n, D) hold something; None: all."""
    return None if empty is None else torch.arange(rest.shape[1], device=rest.device) >= empty[:, None]


def _packed_place(slots: Tensor, empty: Tensor | None, num_packed: int) -> Tensor:
    """(B, n) where among what a head has packed the tokens of these slots lie, of which the first is none."""
    first = 0 if empty is None else empty[:, None]
    return (slots - (slots > first).long()).clamp(min=0, max=num_packed - 1)  # empty slots may name any


def _apart(states: PackedStates, empty: list[Tensor | None]) -> tuple[Tensor, PackedStates]:
    """Each head's first token unpacked, (B, H_kv, 1, D), and the others."""
    parts = states.heads(back=True)
    first = torch.stack([first_apart(part, own)[0] for part, own in zip(parts, empty, strict=True)], dim=1)
    slots = [torch.arange(part.shape[1], device=part.device).expand(len(part), -1) for part in parts]
    return first, states.gathered([first_apart(own, one)[1] for own, one in zip(slots, empty, strict=True)])
