"""A store that holds one token after another in Python lists: what the others must agree with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compresskv.attention.plain import AttentionFunction
from compresskv.cache.stores.base import ROOM, Store
from compresskv.cache.stores.positions import Positions
from compresskv.selection.select import EMPTY_SLOT

Entry = tuple[int, Tensor, Tensor]
"""A token's position, its key (D,) and its value (D,)."""


def alone(position: int, key: Tensor, value: Tensor) -> Entry:
    """An entry that keeps no others in memory."""
    return position, key.clone(), value.clone()


class ReferenceStore(Store):
    """`entries[row][KV head]`: what that head holds of that row. There are no empty slots, and nothing is shared."""

    def __init__(self, entries: list[list[list[Entry]]], num_seen: int, floor: int) -> None:
        super().__init__(Positions(range(floor, num_seen)))
        self.entries = entries

    @classmethod
    def of(cls, store: Store) -> "ReferenceStore":
        """All that another store holds, read one token at a time."""
        heads = store.heads()
        positions = store.positions.expand(-1, len(heads), -1)
        entries: list[list[list[Entry]]] = []
        for row in range(len(positions)):
            entries.append([])
            for head, (keys, values) in enumerate(heads):
                own = positions[row, head, positions.shape[2] - keys.shape[2] :].tolist()
                tokens = zip(own, keys[row, 0], values[row, 0], strict=True)
                entries[-1].append([alone(*entry) for entry in tokens if entry[0] != EMPTY_SLOT])
        return cls(entries, store.held.num_seen, store.held.floor)

    @classmethod
    def fits(cls, held: Positions) -> bool:
        return True

    @classmethod
    def gathered(cls, source: Store, held: Positions, slots: Tensor) -> "ReferenceStore":
        assert held.chosen is not None
        own = source if isinstance(source, ReferenceStore) else cls.of(source)
        store = own.retained(held.chosen.long())
        store.held = held
        return store

    def retained(self, tokens: Tensor) -> "ReferenceStore":
        """The same with the named tokens (B, 1 or H_kv, R) alone."""
        wanted = tokens.expand(-1, self.num_heads, -1).tolist()
        entries = [
            [[entry for entry in held if entry[0] in kept] for held, kept in zip(*pair, strict=True)]
            for pair in zip(self.entries, wanted, strict=True)
        ]
        return ReferenceStore(entries, self.held.num_seen, self.held.num_seen)

    def take(self, slots: Tensor, head: int | None = None) -> tuple[Tensor, Tensor]:
        heads = range(self.num_heads) if head is None else [head]
        positions = self.positions.expand(-1, self.num_heads, -1)
        sides: tuple[list[list[Tensor]], list[list[Tensor]]] = ([], [])
        for row, entries in enumerate(self.entries):
            own = []
            for one in heads:
                by_position = {entry[0]: entry for entry in entries[one]}
                wanted = positions[row, one, slots[row, one if slots.shape[1] == self.num_heads else 0]].tolist()
                own.append([by_position.get(position, entries[one][0]) for position in wanted])
            for side, part in enumerate((1, 2)):
                sides[side].append([torch.stack([entry[part] for entry in held]) for held in own])
        keys, values = (torch.stack([torch.stack(heads) for heads in side]) for side in sides)
        return keys, values

    def append(
        self, key_states: Tensor, value_states: Tensor, room: int = ROOM, *, undecided: bool = False
    ) -> tuple[Tensor, Tensor]:
        for token in range(key_states.shape[2]):
            position = self.held.num_seen + token
            for row, heads in enumerate(self.entries):
                for head, held in enumerate(heads):
                    held.append(alone(position, key_states[row, head, token], value_states[row, head, token]))
        self.held = self.held.appended(key_states.shape[2])
        return key_states, value_states

    def attend(
        self, attention: AttentionFunction, module: nn.Module, query: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, None]:
        """One call for each row and KV head: nothing is masked but what `mask` says of the tokens held."""
        num_new, groups = query.shape[2], query.shape[1] // self.num_heads
        if mask is None:
            mask = torch.ones(num_new, self.held.num_seen, dtype=torch.bool, device=query.device)
            mask = mask.tril(self.held.num_seen - num_new)[None, None]
        rows = []
        for row, heads in enumerate(self.entries):
            outputs = []
            for head, held in enumerate(heads):
                own = query[row : row + 1, head * groups : (head + 1) * groups]
                keys, values = (torch.stack([entry[part] for entry in held])[None, None] for part in (1, 2))
                columns = mask[min(row, len(mask) - 1) :][:1, :1][..., [entry[0] for entry in held]]
                outputs.append(attention(own, keys, values, columns)[0])
            rows.append(torch.cat(outputs, dim=2))
        return torch.cat(rows), None

    @property
    def num_heads(self) -> int:
        return len(self.entries[0])

    @property
    def counts(self) -> list[int]:
        return [max(len(heads[head]) for heads in self.entries) for head in range(self.num_heads)]

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        _, key, value = self.entries[0][0][0]
        keys, values = (one.new_empty(len(self.entries), self.num_heads, 0, len(one)) for one in (key, value))
        return keys, values

    def crop(self, num_removed: int) -> None:
        self.held = self.held.appended(-num_removed)
        self.entries = [[[one for one in held if one[0] < self.held.num_seen] for held in row] for row in self.entries]

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        rows = function(torch.arange(len(self.entries))).tolist()
        self.entries = [[list(held) for held in self.entries[row]] for row in rows]
        self.held = self.held.of_rows(function)

    def __copy__(self) -> "ReferenceStore":
        copied = ReferenceStore([[list(held) for held in heads] for heads in self.entries], 0, 0)
        copied.held = self.held
        return copied

    @property
    def tensors(self) -> list[Tensor]:
        return [state for heads in self.entries for held in heads for entry in held for state in entry[1:]]

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Any:
        raise NotImplementedError
