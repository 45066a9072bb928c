"""Which of a prompt's tokens all layers keep."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.serving.settings import EvictionSpec

_NUM_SINKS = 4


def observe(method: Method, layer: Iterable[LayerInputs]) -> Observation:
    """What one layer tells, whose heads come in pieces of as many each: votes are summed, scores averaged.

    Each piece is read, noted and let go before the next.
    """
    found: list[Observation] = [method.observe(piece) for piece in layer]
    if len(found) == 1:
        return found[0]
    votes = [one.vote for one in found if one.vote is not None]
    scores = [one.scores for one in found if one.scores is not None]
    return replace(
        found[0],
        vote=torch.stack(votes).sum(dim=0) if votes else None,
        scores=torch.stack([score.mean(dim=1, keepdim=True) for score in scores]).mean(dim=0) if scores else None,
    )


def choose_tokens(method: Method, observations: list[Observation], spec: EvictionSpec) -> Tensor:
    """The tokens to keep, (num_kept,) int64, ascending: what `compressing` with the same method keeps.

    Args:
        method: with its profile and with the spec's window; one that `shares_positions`.
    """
    scores = method.score_layers(observations)[0]  # (1, 1, T), the same for all layers
    indices = method.select(scores, [[spec.num_kept]], [spec.num_candidates])
    return indices[0, 0]


def by_position(spec: EvictionSpec, device: torch.device) -> Tensor:
    """The first tokens and the last, (num_kept,) int64, ascending: where nothing tells which others matter."""
    num_sinks = min(_NUM_SINKS, spec.num_kept)
    recent = torch.arange(spec.num_candidates - spec.num_kept + num_sinks, spec.num_candidates, device=device)
    return torch.cat([torch.arange(num_sinks, device=device), recent])
