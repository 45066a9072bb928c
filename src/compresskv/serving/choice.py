"""Which of a prompt's tokens all layers keep."""

from collections.abc import Iterable

from torch import Tensor

from compresskv.methods.base import LayerInputs, Method, Observation
from compresskv.serving.settings import Cut


def observe(method: Method, layers: Iterable[LayerInputs]) -> list[Observation]:
    """What the layers tell; each is read, noted and let go before the next."""
    return [method.observe(layer) for layer in layers]


def choose(method: Method, observations: list[Observation], cut: Cut) -> Tensor:
    """The tokens to keep, (num_kept,) int64, ascending: what `compressing` with the same method keeps.

    Args:
        method: with its profile and with the cut's window; one that `shares_positions`.
    """
    scores = method.score_layers(observations)[0]  # (1, 1, T), the same for all layers
    indices = method.select(scores, [[cut.num_kept]], [cut.num_prompt])
    return indices[0, 0]
