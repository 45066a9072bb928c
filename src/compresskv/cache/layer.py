"""One compressed layer: `seen_tokens` drives positions, `num_retained` what is stored."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.routing import AttentionFunction, scaling_of
from compresskv.cache.eviction import Eviction
from compresskv.cache.masks import causal_mask, retained_mask, valid_keys
from compresskv.cache.routed import RoutedLayer
from compresskv.cache.stores.dense import DenseStore
from compresskv.cache.stores.ragged import RaggedStore, gather_tokens
from compresskv.errors import CacheStateError
from compresskv.methods.base import LayerInputs
from compresskv.models.shape import decoder_config
from compresskv.selection.select import EMPTY_SLOT
from compresskv.system.memory import storage_nbytes

NO_ASSISTANT = "Leave out assistant_model and prompt_lookup_num_tokens, or generate without this cache"


class CompressedLayer(RoutedLayer):
    """One full-attention layer. It stores all of the prompt, attends over it exactly, then evicts and frees the rest.

    After eviction, `keys` holds the R retained prompt tokens and every token since; `positions` (B, H, R) tells which
    prompt tokens they are, H being 1 where all KV heads retain the same. Where KV heads retain different numbers,
    `ragged` holds each head's own tensors, and `keys` the newest tokens only.
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
        self.num_ahead = 0
        self._full_nbytes = 0
        self._retained_nbytes = 0
        self.positions: Tensor | None = None
        self.ragged: RaggedStore | None = None
        self._has_unused = False
        self._growing: DenseStore | None = None
        self._query_window: Tensor | None = None
        self._prompt_end: int | None = self._eviction.prompt_tokens

    @property
    def num_retained(self) -> float:
        """Tokens stored per KV head, the generated ones included: a mean where KV heads differ."""
        if self.ragged is not None:
            return sum(self.ragged.counts) / len(self.ragged.counts)
        return self.stored()[0].shape[-2] if self.is_initialized else 0

    @property
    def has_empty_slots(self) -> bool:
        """Whether some slots must be masked, since rows retain different numbers."""
        return self._has_unused if self.ragged is None else self.ragged.has_empty_slots

    @property
    def mean_retained(self) -> float:
        """Prompt tokens kept, without those looked ahead at: a mean over rows and KV heads."""
        if self.in_prefill:
            return min(self.seen_tokens, self._prompt_end or self.seen_tokens)
        if self.positions is None:
            return self.num_prompt_tokens - self.num_ahead
        return float((self.positions != EMPTY_SLOT).sum(dim=-1).float().mean()) - self.num_ahead

    @property
    def full_nbytes(self) -> int:
        """Bytes of the prompt's keys and values before eviction."""
        if self.in_prefill and self.seen_tokens:
            return int(storage_nbytes(self.tensors) * self.mean_retained / self.seen_tokens)
        return self._full_nbytes

    @property
    def retained_nbytes(self) -> int:
        """Bytes of what was held right after eviction; before that, of what is held now."""
        return storage_nbytes(self.tensors) if self.in_prefill else self._retained_nbytes

    @property
    def tensors(self) -> list[Tensor | None]:
        """All tensors that hold keys and values."""
        return [self.keys, self.values] if self.ragged is None else list(self.ragged.tensors)

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
        if self.ragged is None:
            if self.in_prefill:
                return super()._append(key_states, value_states)
            self.keys, self.values = self._own_growing().append(key_states, value_states)
            return self.keys, self.values
        self.ragged.append(key_states, value_states)
        self.keys, self.values = key_states, value_states  # what tells the attention function that it is this layer's
        return self.stored()

    def _own_growing(self) -> DenseStore:
        """Tensors of this layer's own, to append to in place."""
        keys, values = self.stored()
        if self._growing is None or not self._growing.holds(keys):
            self._growing = DenseStore(keys, values)
        return self._growing

    def reserve_token(self) -> tuple[list[Tensor], list[int], list[int]]:
        """Room for one more token of one row, for code that writes it by itself and then calls `advance`.

        Returns: keys and values, and in them where each KV head's part begins and where its new token goes: for
            (1, H_kv, n, D) tensors, counted in the flattened (H_kv * n, D); for ragged (1, N, D) ones, in N.
        """
        return (self._own_growing() if self.ragged is None else self.ragged).reserve_token()

    def advance(self) -> None:
        """Count the token that was written into what `reserve_token` gave."""
        self.seen_tokens += 1
        if self.ragged is None:
            self.keys, self.values = self._own_growing().advance()
        else:
            self.ragged.advance(1)

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Exact attention over what is stored; the end of prefill evicts."""
        if self.ragged is not None:
            mask_for = functools.partial(self._retained_mask, query, mask, has_empty_slots=self.ragged.has_empty_slots)
            self.keys, self.values = (states[:, :, :0].clone() for states in self.stored())  # its heads hold them
            return self.ragged.attend(attention, kwargs["module"], query, mask_for)
        if not self.in_prefill:
            cut = self._retained_mask(query, mask, self.positions, self.has_empty_slots)
            return attention(query, *self.stored(), cut)
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
        """Keep the window's queries; evict once the whole prompt, and what the method looks ahead at, has been read."""
        eviction = self._eviction
        if self._prompt_end is None:
            self._prompt_end = self.seen_tokens
        ahead = max(0, self.seen_tokens - self._prompt_end) if eviction.method.lookahead else 0
        if self._query_window is not None:
            query = torch.cat([self._query_window, query], dim=2)
        window = query[:, :, max(0, query.shape[2] - eviction.method.window_size - ahead) :]
        if self.seen_tokens >= self._prompt_end + eviction.method.lookahead:
            self._query_window = None
            self.end_prefill(window, valid_keys(mask), scaling_of(query, scaling), softcap, ahead)
        else:
            self._query_window = window.clone()  # a view would keep the whole chunk's queries alive
        if eviction.on_layer is not None and self.seen_tokens <= self._prompt_end:
            eviction.on_layer(self._position + 1, eviction.num_layers)

    def __copy__(self) -> "CompressedLayer":
        """A layer that goes on from here alone; tensors are shared, since nothing that either sees is ever changed."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied._growing = None
        copied.ragged = copy.copy(self.ragged)
        return copied

    def adopt_prompt(self, keys: Tensor, values: Tensor) -> None:
        """Take a prompt's keys and values (B, H_kv, T, D) that were computed elsewhere; `end_prefill` comes next."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.is_initialized = keys, values, True
        self.seen_tokens = keys.shape[2]

    def adopt_generated(self, keys: Tensor, values: Tensor) -> None:
        """Take keys and values (B, H_kv, T_new, D) of tokens that came after an adopted prompt."""
        if self.ragged is not None:
            self.seen_tokens += keys.shape[2]
            self.ragged.append(keys, values)
        else:
            self._append(keys, values)

    def end_prefill(
        self,
        query_window: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
        num_ahead: int = 0,
    ) -> None:
        """End prefill: what is stored is the whole prompt, and is cut as soon as the method can choose.

        Args:
            num_ahead: how many of the last tokens are generated ones that the method looked ahead at.
        """
        keys, values = self.stored()
        self.in_prefill, self.num_prompt_tokens, self.num_ahead = False, self.seen_tokens, num_ahead
        self._retained_nbytes = storage_nbytes([keys, values])
        self._full_nbytes = self._retained_nbytes * (self.seen_tokens - num_ahead) // self.seen_tokens
        inputs = LayerInputs(self.layer_idx, query_window, keys, values, scaling, softcap, valid)
        self._eviction.end_of_prompt(self, self._position, inputs, num_ahead)

    def retain(self, indices: Tensor, scores: Tensor | None = None) -> None:
        """Keep the named prompt tokens and free the memory of all others.

        Args:
            indices: (B, H, R) int64, ascending, H being 1 or the number of KV heads; `EMPTY_SLOT` marks empty slots.
            scores: what they were chosen by; not kept.
        """
        keys, values = self.stored()
        self.positions = indices
        self._has_unused = bool((indices == EMPTY_SLOT).any())
        if self._has_unused and RaggedStore.fits(indices):  # without unused slots, all heads keep as many
            self.ragged = RaggedStore(keys, values, indices)
            self.keys, self.values = (states[:, :, :0].clone() for states in (keys, values))
        else:
            self.keys, self.values = gather_tokens(indices, keys, values)
        self._retained_nbytes = storage_nbytes(self.tensors)

    def _retained_mask(
        self, query: Tensor, mask: Tensor | None, positions: Tensor | None, has_empty_slots: bool
    ) -> Tensor | None:
        """The mask for what is stored; `positions` are the prompt tokens stored, None all."""
        num_new = query.shape[2]
        if positions is None or (mask is None and num_new == 1 and not has_empty_slots):
            return mask
        if mask is None:
            mask = causal_mask(num_new, self.seen_tokens, query.device)
        return retained_mask(mask, positions, self.num_prompt_tokens, query.shape[1])

    def check_crop(self, max_length: int) -> int:
        """The length that `crop` would leave.

        Raises:
            CacheStateError: as for `crop`.
        """
        length = self.seen_tokens + max_length if max_length <= 0 else min(max_length, self.seen_tokens)
        # Assisted decoding reads its first drafts with the prompt, where they take part in the choice of what to keep,
        # and crops at once. Whether that is refused must not depend on whether the drafts were right.
        if not self.in_prefill and (length < self.num_prompt_tokens or self.seen_tokens == self.num_prompt_tokens):
            raise CacheStateError(
                f"cannot crop a compressed cache of {self.seen_tokens} tokens to {length}: its prompt"
                f"{' and look-ahead have' if self.num_ahead else ' has'} {self.num_prompt_tokens}. {NO_ASSISTANT}"
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
            self.seen_tokens = length
            self._growing = None
            if self._query_window is not None:  # while looking ahead
                self._query_window = self._query_window[:, :, :-removed]
            if self.ragged is not None:
                self.ragged.crop(removed)
            else:
                self.keys, self.values = (states[..., :-removed, :] for states in self.stored())

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
            self._growing = None
            self.keys, self.values = map(function, self.stored())
            if self.ragged is not None:
                self.ragged.map_rows(function)
            if self.positions is not None:
                self.positions = function(self.positions)
            if self._query_window is not None:  # while looking ahead
                self._query_window = function(self._query_window)
