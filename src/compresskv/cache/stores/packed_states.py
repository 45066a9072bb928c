"""Keys, or values, of all KV heads of a layer in few bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresskv.cache.stores.packed_vectors import PackedVectors, is_turned, rotation
from compresskv.system.precise import precisely


@dataclass(frozen=True)
class PackedStates:
    """What each KV head holds, one after another. Nothing in it is ever changed, so copies may share it.

    In 4 and in 2 bits, vectors are turned by `rotation` and less their head's mean: what is the same in all tokens, or
    large in a few channels, would take the codes from what differs. Who multiplies them turns queries, not each vector.
    Keys are divided first by the root of what each channel varies by, since queries are small where keys vary much.
    """

    vectors: PackedVectors
    """(B, sum over heads of what they hold, D)."""
    counts: list[int]
    centre: Tensor | None
    """(B, H_kv, D) float16, what each head's turned vectors are less by; None: they are not turned."""
    scale: Tensor | None
    """(B, H_kv, D) float16, what each head's vectors are divided by before they are turned; None: by nothing."""

    @classmethod
    @precisely
    def of(
        cls, parts: list[Tensor], used: Sequence[Tensor | None] | None, bits: int, *, are_keys: bool
    ) -> "PackedStates":
        """Pack what each KV head holds.

        Args:
            parts: of each head (B, n, D).
            used: of each (B, n) bool, which of them count in means; None, also of one: all.
        """
        packed: list[PackedVectors] = []
        centres: list[Tensor] = []
        scales: list[Tensor] = []
        for head, part in enumerate(parts):  # each by itself: what comes between fits into a core's cache
            states = part.float()
            if is_turned(bits):
                own = None if used is None else used[head]
                states, less, divisor = _turned_and_centred(states, own, scaled=are_keys)
                centres.append(less)
                scales += [] if divisor is None else [divisor]
            packed.append(PackedVectors.of(states, bits, are_keys=are_keys))
        centre, scale = (torch.stack(one, dim=1) if one else None for one in (centres, scales))
        return cls(PackedVectors.cat(packed), [part.shape[1] for part in parts], centre, scale)

    @precisely
    def turned_queries(self, query: Tensor) -> Tensor:
        """(B, H_q, T, D): what multiplies these keys as they are stored, of what multiplies them as they were given."""
        if self.centre is None:
            return query
        states = query.float()
        if self.scale is not None:
            by_head = states.unflatten(1, (len(self.counts), -1))
            states = (by_head * self.scale.float()[:, :, None, None]).flatten(1, 2)
        return turned(states).to(query.dtype)

    @precisely
    def turned_output(self, output: Tensor) -> Tensor:
        """(B, T, H_q, D) of attention to these values as they are stored: as if they were as they were given."""
        return output if self.centre is None else turned_back(output).to(output.dtype)

    @precisely
    def turned_states(self, states: Tensor) -> Tensor:
        """(B, H_kv, n, D), of tokens beside these: as these are stored, but unpacked."""
        return states if self.centre is None else self._turned(states).to(states.dtype)

    def _turned(self, states: Tensor) -> Tensor:
        states = states.float()
        return turned(states if self.scale is None else states / self.scale.float()[:, :, None])

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return list(self.state().values())

    @precisely
    def heads(self, *, back: bool) -> list[Tensor]:
        """Of each KV head (B, n, D) float32, turned as they are stored or, with `back`, as they were given."""
        return [self._unpacked(part, head, back=back) for head, part in enumerate(self.vectors.split(self.counts))]

    @precisely
    def taken(self, head: int, indices: Tensor) -> Tensor:
        """(B, R, D) float32 as they were given: the named vectors of a KV head; `indices` is (B, R)."""
        return self._unpacked(self.vectors.split(self.counts)[head].gathered(indices), head, back=True)

    def _unpacked(self, vectors: PackedVectors, head: int, *, back: bool) -> Tensor:
        states = vectors.unpacked()
        if self.centre is not None:
            states = states + self.centre[:, head, None].float()
            states = turned_back(states) if back else states
        return states * self.scale[:, head, None].float() if self.scale is not None and back else states

    @precisely
    def even(self, first: Tensor, tail: Tensor) -> Tensor:
        """(B, H_kv, f + n + t, D) in the tail's dtype: turned as they are stored, where all heads hold as many.

        Args:
            first, tail: (B, H_kv, f or t, D), of tokens before and behind these, as they were given.
        """
        states = self.vectors.unpacked().unflatten(1, (tail.shape[1], -1))
        if self.centre is not None:
            states = states + self.centre.float()[:, :, None]
        return torch.cat([self.turned_states(first), states.to(tail.dtype), self.turned_states(tail)], dim=2)

    @precisely
    def extended(self, states: Tensor) -> "PackedStates":
        """With new tokens (B, H_kv, T_new, D) behind those of each head, less the same mean."""
        if self.centre is not None:
            states = self._turned(states) - self.centre.float()[:, :, None]
        new = PackedVectors.of(states, self.vectors.bits, are_keys=self.scale is not None)
        pairs = zip(self.vectors.split(self.counts), new.codes.unbind(dim=1), new.ranges.unbind(dim=1), strict=True)
        return self._with(
            [PackedVectors.cat([part, PackedVectors(codes, ranges, part.bits)]) for part, codes, ranges in pairs]
        )

    @precisely
    def cropped(self, num_removed: int) -> "PackedStates":
        """Without the last tokens of each head."""
        parts = zip(self.vectors.split(self.counts), self.counts, strict=True)
        return self._with([part.sliced(count - num_removed) for part, count in parts])

    @precisely
    def gathered(self, indices: list[Tensor]) -> "PackedStates":
        """The named vectors of each head; `indices` are (B, R) each."""
        parts = zip(self.vectors.split(self.counts), indices, strict=True)
        return self._with([part.gathered(own) for part, own in parts])

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> "PackedStates":
        """With `function` applied to the rows."""
        centre, scale = (None if one is None else function(one) for one in (self.centre, self.scale))
        vectors = replace(self.vectors, codes=function(self.vectors.codes), ranges=function(self.vectors.ranges))
        return replace(self, vectors=vectors, centre=centre, scale=scale)

    def _with(self, parts: list[PackedVectors]) -> "PackedStates":
        return replace(self, vectors=PackedVectors.cat(parts), counts=[part.codes.shape[1] for part in parts])

    def state(self) -> dict[str, Tensor]:
        """All of it as plain tensors but for the counts; `from_state` reads them."""
        shared = {"centre": self.centre, "scale": self.scale}
        own = {name: tensor for name, tensor in shared.items() if tensor is not None}
        return {"codes": self.vectors.codes, "ranges": self.vectors.ranges, **own}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], counts: list[int], bits: int) -> "PackedStates":
        """Whose `state` this is."""
        vectors = PackedVectors(state["codes"], state["ranges"], bits)
        return cls(vectors, counts, state.get("centre"), state.get("scale"))


def turned(states: Tensor) -> Tensor:
    """(..., D) float32: by `rotation`."""
    return states.float() @ rotation(states.shape[-1], states.device).T


def turned_back(states: Tensor) -> Tensor:
    """The reverse."""
    return states.float() @ rotation(states.shape[-1], states.device)


def _turned_and_centred(part: Tensor, used: Tensor | None, *, scaled: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Vectors (B, n, D) of a head as they are packed, and (B, D) float16 each: its `centre` and its `scale`.

    One product does it all: the division is in the matrix, and the mean of what is turned is the turned mean.
    """
    weights = _weights(part, used)
    mean = _mean(part, weights)
    matrix = rotation(part.shape[-1], part.device).T.expand(len(part), -1, -1)
    scale = _scale(part, mean, weights).half() if scaled else None
    if scale is not None:
        matrix = matrix / scale.float()[:, :, None]
    limit = torch.finfo(torch.float16).max
    centre = (mean[:, None] @ matrix).clamp(-limit, limit).half()
    return torch.baddbmm(centre.float(), part, matrix, beta=-1), centre[:, 0], scale


def _weights(part: Tensor, used: Tensor | None) -> Tensor:
    """(B, n), of the vectors (B, n, D) that count in means; their sum is 1, or 0 where none counts."""
    weights = part.new_ones(part.shape[:2]) if used is None else used.float()
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)


def _mean(part: Tensor, weights: Tensor) -> Tensor:
    """(B, D) over vectors (B, n, D)."""
    return (weights[:, None] @ part)[:, 0]


def _scale(part: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """(B, D): the root of each channel's standard deviation, as a multiple of their mean's; at least a tenth."""
    varied = _mean((part - mean[:, None]).square_(), weights).sqrt()
    usual = varied.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (varied / usual).clamp(min=0.01).sqrt()
