"""The worker's part: score the prompt, choose what stays, and move it together, in every layer."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compresskv.methods.base import LayerInputs, Method
from compresskv.serving.choice import choose, observe
from compresskv.serving.clock import Clock
from compresskv.serving.counters import counters
from compresskv.serving.pages import Pages, find_layout
from compresskv.serving.ranks import Ranks
from compresskv.serving.tap import EndingPrompt, QueryTap


class Compaction:
    """What one worker holds for evictions: the layers' caches, and the tap on their queries."""

    def __init__(self, method: Method, layers: Mapping[int, Any], block_size: int, ranks: Ranks) -> None:
        """Tap and probe the layers.

        Args:
            method: with its profile.
            layers: vLLM's Attention modules by their number in the model, caches bound.
        """
        self._method = method
        self._layers = dict(sorted(layers.items()))
        self._ranks = ranks
        self._read = [layer_idx for layer_idx in self._layers if method.reads_layer(layer_idx)]
        layout = find_layout(next(iter(self._layers.values())), block_size)
        self._pages = {layer_idx: Pages(layer, layout) for layer_idx, layer in self._layers.items()}
        self.tap = QueryTap(self._layers, self._read)
        self.clock = Clock(next(iter(self._layers.values())).kv_cache.device, self._note_seconds)
        if ranks.is_first:
            counters()  # makes their file now, while its folder is surely there

    def evict(self, prompt: EndingPrompt, block_ids: Tensor, targets: Tensor) -> Tensor:
        """Cut one prompt, once its last chunk has passed the model.

        Args:
            block_ids: (n,) int64, on the device: the prompt's blocks.
            targets: (m,): the blocks that the retained tokens move to; the prompt's first ones, or others.
        Returns: the positions kept, (num_kept,), ascending.
        """
        started = self.clock.mark()
        method = self._method.with_window(prompt.cut.window_size)
        observed = observe(method, self._inputs(prompt, block_ids))
        nothing = torch.zeros(1, 1, prompt.cut.num_prompt, device=block_ids.device)
        positions = self._ranks.first(choose(method, self._ranks.together(observed, nothing), prompt.cut))
        scored = self.clock.mark()
        for pages in self._pages.values():
            pages.move(block_ids, positions, targets)
        self.clock.between("scoring_seconds", started, scored)
        self.clock.between("compaction_seconds", scored, self.clock.mark())
        return positions

    def _note_seconds(self, name: str, seconds: float) -> None:
        if self._ranks.is_first:  # all ranks do the same at the same time
            counters().add(name, seconds)

    def _inputs(self, prompt: EndingPrompt, block_ids: Tensor) -> Iterator[LayerInputs]:
        for layer_idx in self._read:
            impl = self._layers[layer_idx].impl
            keys = self._pages[layer_idx].keys(block_ids, prompt.cut.num_prompt)
            yield LayerInputs(
                layer_idx=layer_idx,
                query_window=prompt.queries.pop(layer_idx).transpose(0, 1)[None],
                keys=keys,
                values=keys[..., :0],  # no method that shares positions reads them
                scaling=impl.scale,
                softcap=getattr(impl, "logits_soft_cap", None) or None,
                first_head=self._ranks.rank * impl.num_heads,
            )
