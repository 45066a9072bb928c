"""Rotary position embeddings as tensors: turning queries and keys to other positions, and back to none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

AHEAD = tuple(2**n for n in range(17))
"""How far behind a text's last token queries are expected, in tokens (TriAttention, arXiv 2604.04921, eq. 11)."""


@dataclass(frozen=True)
class Rotation:
    """How one layer's queries and keys depend on their position: y_i = x_i cos_i + sign_i x_partner(i) sin_i."""

    cos: Tensor
    """(P, D) float32, for positions from 0 on; 1 where a dimension does not turn."""
    sin: Tensor
    """(P, D) float32; 0 where a dimension does not turn."""
    partner: Tensor
    """(D,) int64: the other dimension of each one's pair."""
    sign: Tensor
    """(D,) float32."""

    def to(self, device: torch.device) -> Rotation:
        """The same on a device: layers may lie on several."""
        return Rotation(*(table.to(device) for table in (self.cos, self.sin, self.partner, self.sign)))

    def turned(self, states: Tensor, positions: Tensor) -> Tensor:
        """States (..., T, D) as they are at `positions` (T,); float32."""
        states = states.float()
        return states * self.cos[positions] + states[..., self.partner] * (self.sign * self.sin[positions])

    def undone(self, states: Tensor, positions: Tensor) -> Tensor:
        """What states (..., T, D) at `positions` (T,) were before they were turned; float32."""
        states, cos, sin = states.float(), self.cos[positions], self.sin[positions]
        back = states * cos - states[..., self.partner] * (self.sign * sin)
        return back / (cos.square() + sin.square())  # some models scale by more than 1

    def mean_matrix(self, positions: Tensor) -> Tensor:
        """(D, D): the mean of the turns to `positions` (T,), to be multiplied from the right to row vectors."""
        mean = torch.diag(self.cos[positions].mean(dim=0))
        index = torch.arange(len(self.partner), device=mean.device)
        mean[self.partner, index] += self.sign * self.sin[positions].mean(dim=0)
        return mean


@dataclass(frozen=True)
class Turns:
    """By how much one layer's queries and keys turn from each position to the next: any position can be told."""

    angles: Tensor
    """(D,) float64, in radians; 0 where a dimension does not turn. On the CPU, as the others."""
    scale: Tensor
    """(D,) float32: what turned vectors are multiplied by, 1 in most models."""
    partner: Tensor
    """As in `Rotation`."""
    sign: Tensor

    @classmethod
    def told_by(cls, rotation: Rotation) -> Turns:
        """Those of a rotation whose first row is of position 1."""
        cos, sin = rotation.cos[0].cpu().double(), rotation.sin[0].cpu().double()
        scale = (cos.square() + sin.square()).sqrt().float()
        return cls(torch.atan2(sin, cos), scale, rotation.partner.cpu(), rotation.sign.cpu())

    def at(self, positions: Tensor) -> Rotation:
        """The turns to some positions (P,), as the rows of a rotation."""
        angles = positions[:, None].double() * self.angles
        return Rotation(angles.cos().float() * self.scale, angles.sin().float() * self.scale, self.partner, self.sign)
