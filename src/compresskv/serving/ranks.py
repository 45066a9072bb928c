"""Tensor parallelism: each rank scores its own heads, and all keep what the first rank chose."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compresskv.methods.inputs import Observation


class Ranks:
    """The ranks that share a layer's heads.

    Args:
        group: vLLM's coordinator of the tensor parallel group.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.size: int = group.world_size
        self.rank: int = group.rank_in_group

    @property
    def is_first(self) -> bool:
        """Whether this rank decides."""
        return self.rank == 0

    def all_succeeded(self, succeeded: bool, device: torch.device) -> bool:
        """Whether every rank did: they go on in the same way, or wait for one another for ever."""
        if self.size == 1:
            return succeeded
        failures: Tensor = self._group.all_reduce(
            torch.tensor([0.0 if succeeded else 1.0], dtype=torch.float32, device=device)
        )
        return not bool(failures.item())

    def together(self, observations: Sequence[Observation], nothing: Tensor) -> list[Observation]:
        """Observations over all ranks' heads: votes are summed, scores averaged (each rank has as many heads).

        One layer after the other, since all at once would take their memory again.

        Args:
            nothing: (1, 1, T) zeros, in the place of what a rank has no heads for.
        """
        if self.size == 1:
            return list(observations)
        return [self._summed(one, nothing) for one in observations]

    def _summed(self, one: Observation, nothing: Tensor) -> Observation:
        vote = nothing if one.vote is None else one.vote
        scores = nothing if one.scores is None else one.scores / self.size
        vote, scores = self._group.all_reduce(torch.stack([vote, scores])).unbind(0)
        return replace(one, vote=vote, scores=None if one.scores is None else scores)

    def first(self, positions: Tensor) -> Tensor:
        """The first rank's choice: near ties may differ between ranks in the last bit."""
        return positions if self.size == 1 else self._group.broadcast(positions, src=0)
