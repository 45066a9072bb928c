"""A KV cache that keeps only what a method chose: `seen_tokens` drives positions, `num_retained` what is stored."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from compresskv import budgets
from compresskv.attention import AttentionFunction, RoutedLayer, decoder_config, owned
from compresskv.errors import CacheStateError, ConfigError, ModelError, PromptError
from compresskv.method import LayerInputs, Method
from compresskv.selection import UNUSED, select, select_rows

_NO_ASSISTANT = "Leave out assistant_model and prompt_lookup_num_tokens, or generate without this cache"


class Eviction:
    """What the layers of one cache share: the method, the budget, and the prompt's shape once it is known."""

    def __init__(
        self,
        method: Method,
        budget: budgets.Budget,
        num_layers: int,
        prompt_tokens: int | None,
        on_layer: Callable[[int, int], None] | None,
    ) -> None:
        self.method = method
        self.budget = budgets.check_budget(budget)
        if not isinstance(budget, (int, float)) and len(budget) != num_layers:
            raise ConfigError(f"budget has {len(budget)} numbers, but the model has {num_layers} compressible layers")
        self.num_layers = num_layers
        self.prompt_tokens = prompt_tokens
        self.on_layer = on_layer
        self.row_lengths: list[int] | None = None
        self._layer_budgets: dict[int, list[int]] = {}

    def reset(self) -> None:
        """Forget the last prompt."""
        self.row_lengths = None

    def layer_budget(self, position: int, num_tokens: int) -> int:
        """Tokens that the compressible layer at `position` retains of a prompt of `num_tokens`."""
        if num_tokens not in self._layer_budgets:
            if isinstance(self.budget, (int, float)):
                mean = budgets.resolve(self.budget, num_tokens)
                per_layer = self.method.layer_budgets(mean, self.num_layers, num_tokens)
            else:
                per_layer = self.method.given_budgets(self.budget, num_tokens)
            self._layer_budgets[num_tokens] = per_layer
        return self._layer_budgets[num_tokens][position]

    def note_rows(self, valid: Tensor | None, batch_size: int, num_tokens: int) -> list[int]:
        """The number of tokens in each row that are no padding: read from the device once a prompt.

        Raises:
            PromptError: a row's padding is not all at its left.
        """
        if self.row_lengths is None:
            if valid is None:
                self.row_lengths = [num_tokens] * batch_size
            else:
                lengths = valid.sum(dim=-1)
                expected = torch.arange(num_tokens, device=valid.device) >= num_tokens - lengths[:, None]
                if not torch.equal(valid, expected) or not bool(lengths.all()):
                    raise PromptError("the attention mask has padding inside or right of a prompt: pad on the left")
                self.row_lengths = lengths.tolist()
        return self.row_lengths


class CompressedLayer(RoutedLayer):
    """One full-attention layer. It stores all of the prompt, attends over it exactly, then evicts and frees the rest.

    After eviction, `keys` holds the R retained prompt tokens and every token since; `positions` (B, H, R) tells which
    prompt tokens they are, H being 1 where all KV heads retain the same.
    """

    def __init__(self, layer_idx: int, position: int, model: PreTrainedModel, eviction: Eviction) -> None:
        super().__init__(layer_idx, decoder_config(model))
        self._position = position
        self._eviction = eviction
        self._forget_prompt()

    def _forget_prompt(self) -> None:
        self.seen_tokens = 0
        self.in_prefill = True
        self.num_prompt_tokens = 0
        self.full_nbytes = 0
        self.positions: Tensor | None = None
        self._query_window: Tensor | None = None

    @property
    def num_retained(self) -> int:
        """Tokens stored per KV head, the generated ones included."""
        return self.stored()[0].shape[-2] if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: what positions and attention masks are counted by."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns, offset) of the mask over all seen tokens; `attend` cuts it to what this layer stores.

        Args:
            query_length: new tokens, or their positions (transformers before 5.6).
        """
        num_new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen_tokens + num_new, 0

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.seen_tokens += key_states.shape[-2]
        return super()._append(key_states, value_states)

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention over what is stored; the end of prefill evicts."""
        if not self.in_prefill:
            return attention(query, *self.stored(), self._retained_mask(query, mask))
        output = attention(query, *self.stored(), mask)
        self._observe(query, mask, **kwargs)
        return output

    @torch.no_grad()
    def _observe(
        self,
        query: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> None:
        """Keep the window's queries; evict once the whole prompt has been read."""
        eviction = self._eviction
        if self._query_window is not None:
            query = torch.cat([self._query_window, query], dim=2)
        window = query[:, :, max(0, query.shape[2] - eviction.method.window_size) :]
        if eviction.prompt_tokens is None or self.seen_tokens >= eviction.prompt_tokens:
            self._query_window = None
            self._evict(window, mask, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
        else:
            self._query_window = window.clone()  # a view would keep the whole chunk's queries alive
        if eviction.on_layer is not None:
            eviction.on_layer(self._position + 1, eviction.num_layers)

    def _evict(self, query_window: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        keys, values = self.stored()
        num_tokens = self.seen_tokens
        valid = _valid_keys(mask)
        row_lengths = self._eviction.note_rows(valid, keys.shape[0], num_tokens)
        row_budgets = [self._eviction.layer_budget(self._position, length) for length in row_lengths]
        self.in_prefill, self.num_prompt_tokens = False, num_tokens
        self.full_nbytes = storage_nbytes([keys, values])
        if all(budget >= length for budget, length in zip(row_budgets, row_lengths, strict=True)):
            return
        method = self._eviction.method
        inputs = LayerInputs(
            self.layer_idx,
            query_window,
            keys,
            values,
            scaling,
            softcap,
            None if min(row_lengths) == num_tokens else valid,
        )
        scores = method.score(inputs)
        if inputs.valid is None:
            self.retain(select(scores, row_budgets[0], method.window_size))
        else:
            self.retain(select_rows(scores, row_budgets, method.window_size, row_lengths))

    def retain(self, indices: Tensor) -> None:
        """Keep the named prompt tokens and free the memory of all others.

        Args:
            indices: (B, H, R) int64, ascending, H being 1 or the number of KV heads; `UNUSED` marks empty slots.
        """
        where = indices.clamp(min=0)[..., None]
        self.keys, self.values = (torch.take_along_dim(states, where, dim=2) for states in self.stored())
        self.positions = indices

    def _retained_mask(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        """Cut the mask over all seen tokens to this layer's columns: (B, 1 or H_q, T_new, stored)."""
        num_new = query.shape[2]
        if self.positions is None or (mask is None and num_new == 1):
            return mask
        num_prompt = self.num_prompt_tokens
        if mask is None:  # transformers left causality to the function, but our columns are not aligned to the queries
            mask = torch.ones(num_new, self.seen_tokens, dtype=torch.bool, device=query.device)
            mask = mask.tril_(self.seen_tokens - num_new)[None, None]
        num_heads, unused = self.positions.shape[1], self.positions == UNUSED
        index = self.positions.clamp(min=0)[:, :, None].expand(-1, -1, num_new, -1)
        old = mask[..., :num_prompt].expand(len(self.positions), num_heads, -1, -1).gather(-1, index)
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        old = old.masked_fill(unused[:, :, None], blocked)
        new = mask[..., num_prompt:].expand(*old.shape[:3], -1)
        cut = torch.cat([old, new], dim=-1)
        return cut if num_heads == 1 else cut.repeat_interleave(query.shape[1] // num_heads, dim=1)

    def check_crop(self, max_length: int) -> int:
        """The length that `crop` would leave.

        Raises:
            CacheStateError: as for `crop`.
        """
        length = self.seen_tokens + max_length if max_length <= 0 else min(max_length, self.seen_tokens)
        # Assisted decoding reads its first drafts with the prompt, so that they took part in the choice of what to keep,
        # and crops at once. That must not depend on whether these drafts were right.
        if not self.in_prefill and (length < self.num_prompt_tokens or self.seen_tokens == self.num_prompt_tokens):
            raise CacheStateError(
                f"cannot crop a compressed cache of {self.seen_tokens} tokens to {length}: "
                f"its prompt has {self.num_prompt_tokens}. {_NO_ASSISTANT}"
            )
        return length

    def crop(self, max_length: int) -> None:
        """Remove generated tokens from the end.

        Args:
            max_length: negative, the number of tokens to remove (as transformers 5.23 means it); or the length to
                keep, as seen tokens (as 5.2 does).
        Raises:
            CacheStateError: nothing was generated since the prompt, or it would cut into the prompt.
        """
        length = self.check_crop(max_length)
        if removed := self.seen_tokens - length:
            self.keys, self.values = (states[..., :-removed, :] for states in self.stored())
            self.seen_tokens = length

    def reset(self) -> None:
        """Forget everything; the next forward pass is a new prompt."""
        super().reset()
        self._forget_prompt()
        self._eviction.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = map(function, self.stored())
            if self.positions is not None:
                self.positions = function(self.positions)


class CompressedCache(Cache):
    """The cache to pass as `past_key_values` inside `compressing`. One prompt at a time; `reset()` for the next.

    Full-attention layers are compressed. Sliding-window and linear-attention layers keep transformers' own layers:
    they are bounded already.
    """

    # transformers' assisted decoding and deferred stopping ask this before they rely on `crop`
    is_croppable = False

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        budget: budgets.Budget,
        *,
        prompt_tokens: int | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> None:
        """Build an empty cache.

        Args:
            prompt_tokens: the prompt's length, where it is read in several forward passes; None: in the first one.
            on_layer: called in prefill with (layers done, layers).
        Raises:
            ModelError: the model has no full-attention layer.
            ConfigError: the budget cannot work.
        """
        eviction = Eviction(method, budget, len(compressible_layers(model)), prompt_tokens, on_layer)
        make = functools.partial(CompressedLayer, model=model, eviction=eviction)
        super().__init__(layers=routed_layers(model, make))
        self.method = method

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H_kv, T_new, D) and return all that it attends to."""
        stored: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, DynamicSlidingWindowLayer) and key_states.shape[-2] > 1:
            # It keeps a view of the whole prompt, which would stay in memory until the next token.
            layer.keys, layer.values = (owned(states) for states in (layer.keys, layer.values) if states is not None)
        return stored

    def __bool__(self) -> bool:
        """Whether anything was read. Phi-3's generate drops a true cache whose length is below its switch of RoPE factors:
        an empty one would be replaced by an uncompressed one.
        """
        return self.get_seq_length() > 0

    def crop(self, max_length: int) -> None:
        """Remove generated tokens from the end; see `CompressedLayer.crop`."""
        for layer in self.compressed_layers:  # refuse before any layer is changed
            layer.check_crop(max_length)
        super().crop(max_length)

    def activate_past_recording(self) -> None:
        """Refuse: newer transformers call this before assisted decoding reads the prompt.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(f"a compressed cache cannot take drafts back out of its prompt. {_NO_ASSISTANT}")

    def reset(self) -> None:
        """Forget everything; the next forward pass is a new prompt."""
        super().reset()  # type: ignore[no-untyped-call]
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # older transformers leave zeros that count as tokens
                layer.keys = layer.values = None
                layer.is_initialized = False

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The full-attention layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that keys and values hold now, in all layers."""
        return _layers_nbytes(self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that the cache held, or would have held, for the whole prompt before eviction."""
        other = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        return _layers_nbytes(other) + sum(layer.full_nbytes for layer in self.compressed_layers)


def compressible_layers(model: PreTrainedModel) -> list[int]:
    """The numbers of the model's full-attention layers.

    Raises:
        ModelError: there is none.
    """
    layers = DynamicCache(config=decoder_config(model)).layers
    indices = [layer_idx for layer_idx, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not indices:
        raise ModelError(f"{type(model).__name__} has no full-attention layer, so there is nothing to compress")
    return indices


def routed_layers(model: PreTrainedModel, make: Callable[[int, int], RoutedLayer]) -> list[Any]:
    """One cache layer for each layer of the model, the full-attention ones made by `make(layer_idx, position)`."""
    layers = list(DynamicCache(config=decoder_config(model)).layers)
    for position, layer_idx in enumerate(compressible_layers(model)):
        layers[layer_idx] = make(layer_idx, position)
    return layers


def storage_nbytes(tensors: list[Tensor | None]) -> int:
    """Bytes of the distinct storages behind `tensors`: a small view of a large tensor counts as the large one."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _layers_nbytes(layers: Sequence[Any]) -> int:
    return storage_nbytes([getattr(layer, name, None) for layer in layers for name in ("keys", "values")])


def _valid_keys(mask: Tensor | None) -> Tensor | None:
    """(B, T) bool: the keys that the last query may attend to. It is the prompt's end, so all but padding."""
    if mask is None:
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
