"""Keys, or values, of all KV heads of a layer in few bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresskv.cache.stores.packed_vectors import PackedVectors, rotation


@dataclass(frozen=True)
class PackedStates:
    """What each KV head holds, one after another. Nothing in it is ever changed, so copies may share it.

    In 4 bits, vectors are turned by `rotation` and less their head's mean: what is the same in all tokens, or large in
    a few channels, would take the codes from what differs. Who multiplies them turns queries, not each vector.
    """

    vectors: PackedVectors
    """(B, sum over heads of what they hold, D)."""
    counts: list[int]
    centre: Tensor | None
    """(B, H_kv, D) float16, what each head's turned vectors are less by; None: they are not turned."""

    @classmethod
    def of(cls, parts: list[Tensor], used: list[Tensor] | None, bits: int) -> "PackedStates":
        """Pack what each KV head holds.

        Args:
            parts: of each head (B, n, D).
            used: of each (B, n) bool, which of them count in the mean; None: all. Each row has one at least.
        """
        centre = None
        if bits == 4:
            parts = [turned(part) for part in parts]
            means = [_mean(part, None if used is None else used[head]) for head, part in enumerate(parts)]
            limit = torch.finfo(torch.float16).max
            centre = torch.stack(means, dim=1).clamp(-limit, limit).half()
            parts = [part - own[:, None] for part, own in zip(parts, centre.float().unbind(dim=1), strict=True)]
        vectors = PackedVectors.of(torch.cat(parts, dim=1), bits)
        return cls(vectors, [part.shape[1] for part in parts], centre)

    @property
    def is_turned(self) -> bool:
        """Whether `turned` queries multiply them."""
        return self.centre is not None

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        centre = [] if self.centre is None else [self.centre]
        return [self.vectors.codes, self.vectors.ranges, *centre]

    def heads(self, *, back: bool) -> list[Tensor]:
        """Of each KV head (B, n, D) float32, turned as they are stored or, with `back`, as they were given."""
        parts = list(self.vectors.unpacked().split(self.counts, dim=1))
        if self.centre is not None:
            parts = [part + own[:, None] for part, own in zip(parts, self.centre.float().unbind(dim=1), strict=True)]
            parts = [turned_back(part) for part in parts] if back else parts
        return parts

    def extended(self, states: Tensor) -> "PackedStates":
        """With new tokens (B, H_kv, T_new, D) behind those of each head, less the same mean."""
        if self.centre is not None:
            states = turned(states) - self.centre.float()[:, :, None]
        new = PackedVectors.of(states, self.vectors.bits)
        pairs = zip(self.vectors.split(self.counts), new.codes.unbind(dim=1), new.ranges.unbind(dim=1), strict=True)
        return self._with(
            [PackedVectors.cat([part, PackedVectors(codes, ranges, part.bits)]) for part, codes, ranges in pairs]
        )

    def cropped(self, num_removed: int) -> "PackedStates":
        """Without the last tokens of each head."""
        parts = zip(self.vectors.split(self.counts), self.counts, strict=True)
        return self._with([part.sliced(count - num_removed) for part, count in parts])

    def gathered(self, indices: list[Tensor]) -> "PackedStates":
        """The named vectors of each head; `indices` are (B, R) each."""
        parts = zip(self.vectors.split(self.counts), indices, strict=True)
        return self._with([part.gathered(own) for part, own in parts])

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> "PackedStates":
        """With `function` applied to the rows."""
        centre = None if self.centre is None else function(self.centre)
        vectors = replace(self.vectors, codes=function(self.vectors.codes), ranges=function(self.vectors.ranges))
        return replace(self, vectors=vectors, centre=centre)

    def _with(self, parts: list[PackedVectors]) -> "PackedStates":
        return replace(self, vectors=PackedVectors.cat(parts), counts=[part.codes.shape[1] for part in parts])

    def state(self) -> dict[str, Tensor]:
        """All of it as plain tensors but for the counts; `from_state` reads them."""
        centre = {} if self.centre is None else {"centre": self.centre}
        return {"codes": self.vectors.codes, "ranges": self.vectors.ranges, **centre}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], counts: list[int], bits: int) -> "PackedStates":
        """Whose `state` this is."""
        return cls(PackedVectors(state["codes"], state["ranges"], bits), counts, state.get("centre"))


def turned(states: Tensor) -> Tensor:
    """(..., D) float32: by `rotation`."""
    return states.float() @ rotation(states.shape[-1], states.device).T


def turned_back(states: Tensor) -> Tensor:
    """The reverse."""
    return states.float() @ rotation(states.shape[-1], states.device)


def _mean(part: Tensor, used: Tensor | None) -> Tensor:
    """(B, D) over the vectors (B, n, D) that are used."""
    if used is None:
        return part.mean(dim=1)
    weights = used.float()
    return torch.einsum("bn,bnd->bd", weights, part) / weights.sum(dim=1, keepdim=True).clamp(min=1)
