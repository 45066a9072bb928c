"""The observation window's queries, looked at as they pass through vLLM's attention."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compresskv.errors import ServingError
from compresskv.methods.inputs import Observation
from compresskv.serving.settings import EvictionSpec


@dataclass
class EndingPrompt:
    """A prompt that the present step reads to its end."""

    request_id: str
    spec: EvictionSpec
    block_ids: Tensor
    """(n,) int64, on the device: its blocks."""
    window: slice
    """The window's tokens among those of the step."""
    earlier: Sequence[tuple["Noted", slice]] = ()
    """Those of earlier steps, and where their queries are."""
    observations: dict[int, Observation] = field(default_factory=dict)
    """For each layer that the method reads."""
    failure: Exception | None = None
    """Why it cannot be scored."""


Noted = dict[int, Tensor]
"""For each layer, the queries (n, H_q, D) of some tokens of a step."""


class QueryTap:
    """Shows queries of `ending` prompts, and notes those of `watched` tokens; other steps pass through untouched."""

    def __init__(
        self, layers: Mapping[int, Any], read: Iterable[int], look: Callable[[EndingPrompt, int, Tensor], None]
    ) -> None:
        """Tap layers.

        Args:
            layers: vLLM's Attention modules by their number in the model.
            read: the numbers of those whose queries are wanted.
            look: is given a prompt, the layer's number and (W, H_q, D) queries, post-RoPE, once the keys are stored.
        """
        self.ending: list[EndingPrompt] = []
        self.watched: Tensor | None = None
        """(n,) int64, on the device: tokens of the present step."""
        self.noted: Noted = {}
        """Their queries."""
        self._look = look
        self._tapped: list[Any] = []
        for layer_idx in read:
            impl = layers[layer_idx].impl
            names = list(inspect.signature(impl.forward).parameters)
            if names[:2] != ["layer", "query"]:
                raise ServingError(f"compresskv inside vLLM: {type(impl).__name__}.forward takes ({', '.join(names)})")
            impl.forward = self._tap(impl.forward, layer_idx)
            self._tapped.append(impl)

    def remove(self) -> None:
        """Leave the layers as they were."""
        for impl in self._tapped:
            impl.forward = impl.forward.__wrapped__

    def _tap(self, forward: Callable[..., Any], layer_idx: int) -> Callable[..., Any]:
        @functools.wraps(forward)
        def tapped(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(layer, query, *args, **kwargs)
            if self.watched is not None:
                self.noted[layer_idx] = query.index_select(0, self.watched)
            for prompt in self.ending:
                own = query[prompt.window]
                if prompt.earlier:
                    own = torch.cat([*(noted[layer_idx][part] for noted, part in prompt.earlier), own])
                self._look(prompt, layer_idx, own)
            return output

        return tapped
