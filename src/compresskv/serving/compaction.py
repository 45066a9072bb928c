"""The worker's part: score the prompt, choose what stays, and move it together, in every layer."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compresskv.methods.base import Method
from compresskv.methods.inputs import LayerInputs
from compresskv.serving.choice import by_position, choose_tokens, observe
from compresskv.serving.counters import counters
from compresskv.serving.inputs import PagedInputs
from compresskv.serving.numbers import Numbers
from compresskv.serving.pages import Pages, find_layout
from compresskv.serving.ranks import Ranks
from compresskv.serving.room import LayerShape
from compresskv.serving.tap import EndingPrompt, QueryTap
from compresskv.system.clock import Clock

logger = logging.getLogger("vllm.compresskv")


class Compaction:
    """What one worker holds for evictions: the layers' caches, and the tap on their queries."""

    def __init__(
        self,
        method: Method,
        layers: Mapping[int, Any],
        block_size: int,
        ranks: Ranks,
        decode_method: Method | None = None,
    ) -> None:
        """Tap and probe the layers.

        Args:
            method: with its profile.
            decode_method: for what is generated, likewise; None: it is kept.
            layers: vLLM's Attention modules by their number in the model, caches bound.
        """
        self._methods = {False: method, True: decode_method or method}  # by whether the cut is of what was generated
        self._layers = dict(sorted(layers.items()))
        self._ranks = ranks
        self._read = {
            generated: [layer_idx for layer_idx in self._layers if one.reads_layer(layer_idx)]
            for generated, one in self._methods.items()
        }
        first = next(iter(self._layers.values()))
        layout, numbers = find_layout(first, block_size), Numbers.of(first)
        self._pages = {layer_idx: Pages(layer, layout) for layer_idx, layer in self._layers.items()}
        self._shape = LayerShape(
            first.num_kv_heads,
            first.impl.num_heads // first.num_kv_heads,
            first.head_size,
            first.kv_cache.element_size(),
            0 if numbers.fp8 is None else numbers.dtype.itemsize,
        )
        self.tap = QueryTap(self._layers, sorted({*self._read[False], *self._read[True]}), self._look)
        self.clock = Clock(first.kv_cache.device, self._note_seconds)
        if ranks.is_first:
            counters()  # makes their file now, while its folder is surely there

    def evict(self, prompt: EndingPrompt, targets: Tensor) -> Tensor:
        """Cut one prompt, once its last chunk has passed the model.

        Args:
            targets: (m,): the blocks that the retained tokens move to; the prompt's first ones, or others.
        Returns: the positions kept, (num_kept,), ascending.
        """
        started = self.clock.mark()
        positions = self._chosen(prompt)
        scored = self.clock.mark()
        for pages in self._pages.values():
            pages.move(prompt.block_ids, positions, targets, self._shape.moved_at_once())
        self.clock.between("scoring_seconds", started, scored)
        self.clock.between("compaction_seconds", scored, self.clock.mark())
        return positions

    def _chosen(self, prompt: EndingPrompt) -> Tensor:
        """What is kept. The prompt's other blocks are others' already: where scoring fails, positions decide."""
        spec, device = prompt.spec, prompt.block_ids.device
        read, method = self._read[spec.generated], self._methods[spec.generated].with_window(spec.window_size)
        if prompt.failure is None and prompt.observations.keys() != set(read):
            prompt.failure = RuntimeError("the window's queries were not seen in all layers")
        positions = by_position(spec, device)
        if self._ranks.all_succeeded(prompt.failure is None, device):
            nothing = torch.zeros(1, 1, spec.num_candidates, dtype=torch.float32, device=device)
            observed = self._ranks.together([prompt.observations[layer_idx] for layer_idx in read], nothing)
            try:
                positions = choose_tokens(method, observed, spec)
            except Exception as error:  # noqa: BLE001 - whatever a method raises, the engine goes on
                prompt.failure = error
        prompt.observations.clear()
        if prompt.failure is not None:
            logger.warning("compresskv: a prompt is cut by position alone, for scoring failed: %r", prompt.failure)
        if self._ranks.is_first and prompt.failure is not None:
            counters().add("unscored_prompts", 1)
        return self._ranks.first(positions)

    def _look(self, prompt: EndingPrompt, layer_idx: int, queries: Tensor) -> None:
        """Note what one layer tells of a prompt, while its queries pass."""
        generated = prompt.spec.generated
        if prompt.failure is not None or layer_idx not in self._read[generated]:
            return
        started = self.clock.mark()
        method = self._methods[generated].with_window(prompt.spec.window_size)
        try:
            prompt.observations[layer_idx] = observe(method, self._inputs(prompt, layer_idx, queries))
        except Exception as error:  # noqa: BLE001 - whatever a method raises, and memory that runs out
            prompt.failure = error
            prompt.observations.clear()
        self.clock.between("scoring_seconds", started, self.clock.mark())

    def _note_seconds(self, name: str, seconds: float) -> None:
        if self._ranks.is_first:  # all ranks do the same at the same time
            counters().add(name, seconds)

    def _inputs(self, prompt: EndingPrompt, layer_idx: int, queries: Tensor) -> Iterator[LayerInputs]:
        """The layer, as many KV heads at once as there is room for."""
        impl, shape, num_tokens = self._layers[layer_idx].impl, self._shape, prompt.spec.num_candidates
        num_heads, piece = shape.scored_at_once(num_tokens, prompt.spec.window_size)
        by_head = queries.transpose(0, 1)[None]  # (1, H_q, W, D)
        for start in range(0, shape.num_kv_heads, num_heads):
            first, last = start * shape.num_groups, (start + num_heads) * shape.num_groups
            yield PagedInputs(
                self._pages[layer_idx],
                prompt.block_ids,
                num_tokens,
                slice(start, start + num_heads),
                piece,
                layer_idx=layer_idx,
                query_window=by_head[:, first:last],
                scaling=impl.scale,
                softcap=getattr(impl, "logits_soft_cap", None) or None,
                valid=None,
                first_head=self._ranks.rank * impl.num_heads + first,
            )
