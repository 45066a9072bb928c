"""The naive store with every number rounded as a packed store rounds it: what packed ones must agree with."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from compresskv.cache.stores import packed
from compresskv.cache.stores.base import ROOM, Store
from compresskv.cache.stores.packed_vectors import PackedVectors, rotation
from compresskv.cache.stores.positions import Positions
from compresskv.selection.precision import PRECISIONS, Precision
from reference_store import Entry, ReferenceStore


class Means(NamedTuple):
    """Of what one row's head holds."""

    scale: Tensor
    """(D,), what its keys are divided by where they are turned."""
    key: Tensor
    """(D,), of turned keys."""
    value: Tensor


class RoundingStore(ReferenceStore):
    """Entries from position `first_exact` on, and each head's first one, are as the model gave them."""

    precision: ClassVar[Precision]

    @classmethod
    def gathered(cls, source: Store, held: Positions, slots: Tensor) -> "RoundingStore":
        assert held.chosen is not None
        own = source if isinstance(source, ReferenceStore) else ReferenceStore.of(source)
        if isinstance(own, RoundingStore):
            own._round()
        kept = own.retained(held.chosen.long())
        store = cls(kept.entries, kept.held.num_seen, kept.held.floor)
        store.held, store.first_exact = held, held.num_seen
        if isinstance(own, RoundingStore):
            store.means = own.means
        else:
            store.means = [[means(held) for held in heads] for heads in store.entries]
            store.first_exact = 0
            store._round()
        return store

    first_exact: int
    means: list[list[Means]]

    def _round(self) -> None:
        bits = self.precision.key_bits, self.precision.value_bits
        for heads, by_head in zip(self.entries, self.means, strict=True):
            for held, own in zip(heads, by_head, strict=True):
                held[1:] = [self._rounded(entry, own, bits) for entry in held[1:]]
        self.first_exact = self.held.num_seen

    def _rounded(self, entry: Entry, own: Means, bits: tuple[int | None, int | None]) -> Entry:
        position, key, value = entry
        if position < self.first_exact:
            return entry
        scale = torch.ones_like(own.scale) if bits[0] == 8 else own.scale
        key = scale * rounded(key / scale, own.key, bits[0], are_keys=True)
        return position, key, rounded(value, own.value, bits[1], are_keys=False)

    def append(
        self, key_states: Tensor, value_states: Tensor, room: int = ROOM, *, undecided: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.held.num_seen - self.first_exact >= packed.TAIL:
            self._round()
        return super().append(key_states, value_states, room, undecided=undecided)

    def crop(self, num_removed: int) -> None:
        super().crop(num_removed)
        self.first_exact = min(self.first_exact, self.held.num_seen)

    def map_rows(self, function: object) -> None:
        rows = function(torch.arange(len(self.entries))).tolist()  # type: ignore[operator]
        super().map_rows(function)  # type: ignore[arg-type]
        self.means = [self.means[row] for row in rows]

    def __copy__(self) -> "RoundingStore":
        copied = type(self)([[list(held) for held in heads] for heads in self.entries], 0, 0)
        copied.held, copied.first_exact, copied.means = self.held, self.first_exact, self.means
        return copied


def rounding(name: str) -> type[RoundingStore]:
    """In place of a packed store, by the name of its precision."""
    return type("Rounding", (RoundingStore,), {"precision": PRECISIONS[name]})


def assert_as_rounded(found: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Logits (B, T, vocab) of a packed store are those of `rounding`, which differ from those of all bits."""
    lost = (found - exact).abs().mean(dim=(0, 2))
    assert lost.min() > 1e-4, "otherwise this tests nothing"
    # A number that lies between two codes, but for rounding, may get either.
    assert ((found - expected).abs().mean(dim=(0, 2)) < 0.02 * lost).all()


def means(held: list[Entry]) -> Means:
    """Of all but the first."""
    keys, values = (torch.stack([entry[part] for entry in held])[1:].float() for part in (1, 2))
    varied = keys.std(dim=0, correction=0).nan_to_num()  # of none
    scale = (varied / varied.mean().clamp(min=1e-30)).clamp(min=0.01).sqrt().half().float()
    turn = rotation(keys.shape[1], keys.device)
    key, value = ((states @ turn.T).mean(dim=0).nan_to_num() for states in (keys / scale, values))
    return Means(scale, key.half().float(), value.half().float())


def turned(vector: Tensor) -> Tensor:
    return rotation(len(vector), vector.device) @ vector.float()


def rounded(vector: Tensor, centre: Tensor, bits: int | None, *, are_keys: bool) -> Tensor:
    assert bits is not None
    if bits == 8:
        return PackedVectors.of(vector, bits).unpacked().to(vector.dtype)
    codes = PackedVectors.of(turned(vector) - centre, bits, are_keys=are_keys).unpacked()
    return (rotation(len(vector), vector.device).T @ (codes + centre)).to(vector.dtype)
