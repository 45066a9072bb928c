"""What an answer's tokens attended to, of what was kept."""

from typing import Any

import torch
from torch import Tensor

from compresskv.attention.plain import scaling_of
from compresskv.cache.layer import CompressedLayer
from compresskv.selection.scores import window_attention


class Attended:
    """Adds up the attention of each pass's last token; given to `watching` while one prompt is answered."""

    def __init__(self, num_tokens: int) -> None:
        """Of the prompt."""
        self._totals = torch.zeros(num_tokens, dtype=torch.float64)
        self._num_seen = 0

    @torch.no_grad()
    def __call__(self, layer: object, query: Tensor, **kwargs: Any) -> None:
        """Note one layer's attention."""
        if not isinstance(layer, CompressedLayer) or layer.store is None:
            return
        heads, groups = layer.store.heads(), query.shape[1] // layer.store.num_heads
        positions = layer.store.positions.expand(1, len(heads), -1)[0]
        sinks, scaling = kwargs.get("s_aux"), scaling_of(query, kwargs.get("scaling"))
        for head, (keys, _) in enumerate(heads):
            own = slice(head * groups, (head + 1) * groups)
            weights = window_attention(
                query[:, own, -1:],
                keys,
                scaling=scaling,
                softcap=kwargs.get("softcap"),
                sinks=None if sinks is None else sinks[own],
            )
            places = positions[head, positions.shape[1] - keys.shape[2] :]
            is_prompt = places < len(self._totals)
            shares = weights.sum(dim=(0, 1, 2)).cpu().double() / query.shape[1]
            self._totals.index_add_(0, places[is_prompt].cpu(), shares[is_prompt.cpu()])
        self._num_seen += 1

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each prompt token: its mean share in the attention of all query heads, layers and the answer's tokens."""
        return tuple((self._totals / max(1, self._num_seen)).tolist())
