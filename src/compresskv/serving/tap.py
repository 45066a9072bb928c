"""The observation window's queries, copied as they pass through vLLM's attention."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compresskv.errors import ServingError
from compresskv.serving.settings import Cut


@dataclass
class EndingPrompt:
    """A prompt that the present step reads to its end."""

    request_id: str
    row: int
    """Its row in the batch."""
    cut: Cut
    window: slice
    """The window's tokens among those of the step."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """For each layer that the method reads, (W, H_q, D), post-RoPE."""


class QueryTap:
    """Copies queries of `ending` prompts; other steps pass through untouched."""

    def __init__(self, layers: Mapping[int, Any], read: Iterable[int]) -> None:
        """Tap layers.

        Args:
            layers: vLLM's Attention modules by their number in the model.
            read: the numbers of those whose queries are wanted.
        """
        self.ending: list[EndingPrompt] = []
        for layer_idx in read:
            impl = layers[layer_idx].impl
            names = list(inspect.signature(impl.forward).parameters)
            if names[:2] != ["layer", "query"]:
                raise ServingError(f"compresskv inside vLLM: {type(impl).__name__}.forward takes ({', '.join(names)})")
            impl.forward = self._tapped(impl.forward, layer_idx)

    def _tapped(self, forward: Callable[..., Any], layer_idx: int) -> Callable[..., Any]:
        @functools.wraps(forward)
        def tapped(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            for prompt in self.ending:
                prompt.queries[layer_idx] = query[prompt.window].clone()
            return forward(layer, query, *args, **kwargs)

        return tapped
