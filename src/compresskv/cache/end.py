"""A prompt's end, read before it comes: what a choice in the middle of the prompt is for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compresskv.attention.routing import watching
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.window import QueryWindow


@torch.no_grad()
def queries_of_end(layers: list[CompressedLayer], size: int, read: Callable[[], object]) -> list[QueryWindow]:
    """The last queries, at most `size`, that a prompt's end has in each layer while `read` reads it.

    Args:
        layers: of a branch of the cache, which is thrown away. Each is let go once its attention was computed, so that
            no more than one of them is ever held beside the cache.
    """
    found: dict[int, QueryWindow] = {}
    for layer in layers:
        layer.pass_by()

    def note(layer: Any, query: Tensor, **given: Any) -> None:
        if any(layer is own for own in layers):
            found[layer.layer_idx] = QueryWindow.given(query, **given).last(size)
            layer.let_go()

    with watching(note):
        read()
    return [found[layer.layer_idx] for layer in layers]
