"""One prefill that serves every method: the full cache, with the last queries of the prompt kept."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.pieces import AUTO, PrefillMemory, piece_tokens
from compresskv.attention.plain import AttentionFunction
from compresskv.cache.cache import CompressedCache
from compresskv.cache.conditions import EvictionObserver
from compresskv.cache.full import FullCache
from compresskv.cache.group import one_batch
from compresskv.cache.routed import RoutedLayer
from compresskv.cache.stored import layers_nbytes
from compresskv.cache.window import QueryWindow
from compresskv.methods.base import Method
from compresskv.methods.registry import create
from compresskv.models.decoding import prefill
from compresskv.models.place import input_device
from compresskv.models.shape import compressible_layers, decoder_config
from compresskv.plans.replay import NUM_SINKS, Replayed, check_room, replay
from compresskv.selection.budgets import Budget
from compresskv.selection.precision import NATIVE
from compresskv.selection.replay import largest_attention

_REPLAY_COST = 3
"""Readings that a replay takes as long as, about."""


class WindowLayer(RoutedLayer):
    """Keeps everything and, beside it, the queries of the last `window_size` tokens read."""

    def __init__(
        self,
        layer_idx: int,
        position: int,
        model: PreTrainedModel,
        window_size: int,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(layer_idx, decoder_config(model))
        self._position, self._num_layers = position, len(compressible_layers(model))
        self._window_size = window_size
        self._on_layer = on_layer
        self.window: QueryWindow | None = None
        self.replayed: Replayed | None = None
        self.noted: Tensor | None = None

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Plain attention; the queries are noted, or what those of a replay attend to."""
        if self.replayed is not None:
            self._note(query, self.replayed)
        else:
            self.window = QueryWindow.given(query, **kwargs).following(self.window).last(self._window_size)
        output = super().attend(attention, query, mask, **kwargs)
        if self._on_layer is not None and not self.num_to_come:
            self._on_layer(self._layers_done(), (1 + _REPLAY_COST) * self._num_layers)
        return output

    def _layers_done(self) -> int:
        """Layers that have read the prompt, those of a replay at their cost."""
        done, piece = self._position + 1, self.replayed
        if piece is None:
            return done
        assert self.noted is not None
        again = piece.start * self._num_layers + (piece.stop - piece.start) * done
        return self._num_layers + _REPLAY_COST * again // self.noted.shape[2]

    def _note(self, query: Tensor, piece: Replayed) -> None:
        """Note what a replay's queries (1, H_q, R, D) attend to among the tokens that they repeat."""
        assert self.window is not None
        assert self.noted is not None
        keys, _ = self.stored()
        num_sinks, own = min(NUM_SINKS, piece.start), slice(piece.start, piece.stop)
        again = keys[:, :, self.noted.shape[2] :]
        among = torch.cat([keys[:, :, :num_sinks], keys[:, :, own], again], dim=2)
        found = largest_attention(
            query,
            among,
            among.shape[2] - query.shape[2],
            scaling=self.window.scaling,
            softcap=self.window.softcap,
            sinks=self.window.sinks,
        )
        noted = self.noted[:, :, own]
        torch.maximum(noted, found[:, :, num_sinks : num_sinks + noted.shape[2]], out=noted)


class CapturedPrompt:
    """A prompt's full cache, from which caches of any method and budget are cut without reading it again.

    Batches of one prompt, without padding. All of it happens inside `routing(model)`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        window_size: int,
        *,
        exact_prefill: bool | None = None,
        prefill_memory: PrefillMemory = AUTO,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make an empty one.

        Args:
            window_size: the largest observation window of the methods to come.
            exact_prefill, prefill_memory: as for `compressing`.
            on_layer: called with (layers done, layers): what reads the prompt again counts as more of them.
        Raises:
            ConfigError: `prefill_memory` cannot work.
        """
        self._model = model
        self.cache = FullCache(
            model, lambda layer_idx, position: WindowLayer(layer_idx, position, model, window_size, on_layer)
        )
        self.cache.piece_tokens = piece_tokens(model, prefill_memory)
        if exact_prefill is not None:
            for layer in self.cache.routed:
                layer.exact_prefill = exact_prefill
        self.input_ids: list[int] = []
        self._replayed: list[Tensor] | None = None

    def read(self, input_ids: Sequence[int]) -> Tensor:
        """Read more of the prompt: the last position's logits (vocab,)."""
        self.input_ids = [*self.input_ids, *input_ids]
        self._replayed = None
        return prefill(self._model, torch.tensor([list(input_ids)], device=input_device(self._model)), self.cache)

    def fork(self) -> "CapturedPrompt":
        """What was read so far, to stay as it is when this one reads on."""
        forked = object.__new__(CapturedPrompt)
        forked._model, forked.cache, forked.input_ids = self._model, self.cache.branch(), list(self.input_ids)
        forked._replayed = self._replayed
        return forked

    @property
    def nbytes(self) -> int:
        """Bytes that its keys and values hold, in all layers."""
        return layers_nbytes(self.cache.layers)

    @property
    def replayed(self) -> list[Tensor]:
        """What a second reading of the prompt looks at, for each full-attention layer: read when it is first asked."""
        if self._replayed is None:
            self._replayed = replay(self._model, self.cache, self.input_ids)
        return self._replayed

    def compress(
        self, method: Method, budget: Budget, observer: EvictionObserver | None = None, store: str = NATIVE
    ) -> CompressedCache:
        """The cache that `compressing` would hold after reading the same prompt, in that store."""
        cache = CompressedCache(self._model, method, budget, observer=observer, store=store)
        self.fill(cache)
        return cache

    @torch.no_grad()
    def fill(self, cache: CompressedCache) -> None:
        """Let an empty cache hold what its method keeps of the prompt; this one stays as it is."""
        replayed = iter(self.replayed) if cache.method.replays else itertools.repeat(None)
        for layer_idx, source in enumerate(self.cache.branch().layers):
            if isinstance(source, WindowLayer):
                layer: Any = cache.layers[layer_idx]
                layer.adopt_prompt(*source.stored())
                assert source.window is not None
                layer.observe(replace(source.window, replayed=next(replayed)), None)
            else:
                cache.layers[layer_idx] = source

    @torch.no_grad()
    def side_by_side(self, caches: Sequence[CompressedCache], store: str = NATIVE) -> CompressedCache:
        """What each of `caches`, cut from this prompt, retains, as the rows of one: a pass then serves them all.

        Args:
            store: of them all.
        """
        cache = CompressedCache(self._model, create("full"), 1, store=store)
        for layer_idx, source in enumerate(self.cache.branch().layers):
            if isinstance(source, WindowLayer):
                keys, values = (states.expand(len(caches), -1, -1, -1) for states in source.stored())
                kept = [_kept(one.layers[layer_idx], keys.shape[2]) for one in caches]
                layer: Any = cache.layers[layer_idx]
                layer.adopt_retained(keys, values, one_batch(kept, [[row] for row in range(len(kept))]).to(keys.device))
            else:
                _repeat(source, len(caches))
                cache.layers[layer_idx] = source
        return cache


def read_prompt(model: PreTrainedModel, token_ids: Sequence[int], cache: CompressedCache) -> Tensor:
    """Read one prompt into an empty cache, twice where its method asks for that: the last position's logits (vocab,).

    It happens inside `routing(model)`.
    """
    if not cache.method.replays:
        return prefill(model, torch.tensor([list(token_ids)], device=input_device(model)), cache)
    return read_twice(model, [token_ids], cache)


def read_twice(model: PreTrainedModel, chunks: Sequence[Sequence[int]], cache: CompressedCache) -> Tensor:
    """Read one prompt in chunks, then once more for what `cache`, which is empty, keeps of it; see `read_prompt`.

    Raises:
        PromptError: the model has no positions for that; see `check_room`.
    """
    check_room(model, sum(map(len, chunks)))
    as_given: dict[str, Any] = {
        "exact_prefill": cache.compressed_layers[0].exact_prefill,
        "on_layer": cache.on_layer,
    }
    captured = CapturedPrompt(model, max(1, cache.method.num_observed()), **as_given)
    captured.cache.piece_tokens = cache.piece_tokens
    for chunk in chunks:
        logits = captured.read(chunk)
    captured.fill(cache)
    return logits


def _repeat(layer: Any, count: int) -> None:
    """Make `count` rows of a layer's one, of whatever kind it is: this is what all kinds have for beam search."""
    layer.reorder_cache(torch.zeros(count, dtype=torch.long))


def _kept(layer: Any, num_tokens: int) -> Tensor:
    """(1, H, R): the tokens that a layer of one row retains."""
    return torch.arange(num_tokens)[None, None] if layer.positions is None else layer.positions.cpu()
