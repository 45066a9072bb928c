"""Where a head's queries lie before they are turned to their positions, and what keys are worth to queries there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskv.system.later import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compresskv.selection.rotation import Rotation


class CentreSums:
    """Means over the queries of any number of texts."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | float = 0.0

    def add(self, queries: Tensor, rotation: Rotation | None) -> None:
        """Count queries (H_q, n, D), turned back to no position; `rotation` tells which dimensions make a pair."""
        self._count += queries.shape[1]
        sums = torch.stack([queries.sum(dim=1), pair_norms(queries, rotation).sum(dim=1)])
        self._sums = self._sums + sums.cpu().double()

    def solve(self, rotation: Rotation | None) -> Tensor:
        """(H_q, 2, D) float32, on the CPU as `rotation`: the mean vector, and what scatter adds to norms.

        That is, for each pair of dimensions, by how much the mean of its norms is above the norm of its mean: it stands
        at the pair's first dimension, with 0 at the other.
        """
        assert not isinstance(self._sums, float)
        mean, norms = (self._sums / self._count).float()
        spread = (norms - pair_norms(mean, rotation)).clamp(min=0)
        if rotation is not None:
            spread = spread.masked_fill(rotation.partner < torch.arange(mean.shape[-1], device=mean.device), 0)
        return torch.stack([mean, spread], dim=1)


def pair_norms(states: Tensor, rotation: Rotation | None) -> Tensor:
    """(..., D) float32: for each dimension of states (..., D), the norm of its pair; of itself where it has none."""
    if rotation is None:
        return states.float().abs()
    squares = states.float().square()
    alone = rotation.partner == torch.arange(len(rotation.partner), device=squares.device)
    return (squares + squares[..., rotation.partner].masked_fill(alone, 0)).sqrt()


def centre_scores(keys: Tensor, centres: Tensor, ahead: Rotation | None, num_offsets: int) -> Tensor:
    """What each key is worth to the query heads that read it, on average over positions of queries to come.

    Turning the centre to those positions gives the trigonometric series over distances, term by term: keys lie turned
    to theirs, and the product of two turned vectors depends on their distance alone. So no key is turned back.

    Args:
        keys: (H_kv, n, D), post-RoPE.
        centres: (H_q, 2, D), as of `CentreSums`.
        ahead: as in `LayerInputs`, of which the first `num_offsets` rows count; None: nothing turns.
    Returns: (H_kv, H_q / H_kv, n) float32.
    Source: TriAttention (arXiv 2604.04921), eqs. 6, 9, 10 and 11.
    """
    means, spread = centres.view(len(keys), -1, 2, keys.shape[-1]).unbind(dim=2)  # (H_kv, G, D) each
    if ahead is not None:
        means = means @ ahead.mean_matrix(torch.arange(num_offsets, device=keys.device))
        spread = spread * (ahead.cos[0].square() + ahead.sin[0].square()).sqrt()  # some models scale by more than 1
    return means @ keys.float().transpose(1, 2) + spread @ pair_norms(keys, ahead).transpose(1, 2)
