"""A cache layer over a store: what it shows to the model, and what transformers does to all layers of a cache."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compresskv.attention.masks import expect_mask
from compresskv.attention.plain import AttentionFunction
from compresskv.cache.routed import RoutedLayer, owned
from compresskv.cache.stores.base import ROOM, Slots, Store
from compresskv.cache.stores.dense import DenseStore
from compresskv.errors import CacheStateError
from compresskv.system.memory import storage_nbytes

L = TypeVar("L", bound="StoredLayer")


class StoredLayer(RoutedLayer):
    """One full-attention layer, in which a `store` holds keys and values, and knows the position of each.

    `seen_tokens` drives positions, `num_retained` is what is stored. `keys` and `values` are what the model is given:
    all that is stored, or no more than the newest tokens, as the store likes.
    """

    def __init__(self, layer_idx: int, model_config: PretrainedConfig) -> None:
        super().__init__(layer_idx, model_config)
        self.seen_tokens = 0
        self.store: Store | None = None

    @property
    def num_retained(self) -> float:
        """Tokens stored per KV head, the generated ones included: a mean where KV heads differ."""
        return 0.0 if self.store is None else sum(self.store.counts) / self.store.num_heads

    @property
    def has_empty_slots(self) -> bool:
        """Whether some slots must be masked, since rows retain different numbers."""
        return self.store is not None and self.store.held.has_empty_slots

    @property
    def positions(self) -> Tensor | None:
        """(B, 1 or H_kv, R) int64: the tokens that the last `retain` chose, or `EMPTY_SLOT`; None: all are kept."""
        if self.store is None or self.store.held.chosen is None:
            return None
        return self.store.held.chosen.long()

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that keys and values hold now."""
        return 0 if self.store is None else self.store.nbytes

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that hold keys and values."""
        return [] if self.store is None else self.store.tensors

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: what positions and attention masks are counted by."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns, offset) of the mask over all seen tokens; `attend` cuts it to what this layer stores.

        Args:
            query_length: new tokens, or their positions (transformers before 5.6).
        Raises:
            CacheStateError: there is none.
        """
        num_new = query_length if isinstance(query_length, int) else query_length.shape[0]
        if not num_new:  # `generate` leaves out as many as were seen
            raise CacheStateError(
                f"no token is left to read beside the {self.seen_tokens} that the cache has seen: "
                "reset() the cache before another prompt"
            )
        expect_mask(self.seen_tokens + num_new)
        return self.seen_tokens + num_new, 0

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.seen_tokens += key_states.shape[-2]
        if self.store is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.store = DenseStore(owned(key_states), owned(value_states))
            self.keys, self.values = self.store.states
        else:
            self.keys, self.values = self.store.append(key_states, value_states, self._room, undecided=self.in_prefill)
        return self.keys, self.values

    @property
    def in_prefill(self) -> bool:
        """Whether what is kept of the newest tokens is chosen later."""
        return False

    @property
    def _room(self) -> int:
        """Tokens that the store gets room for when new ones come, beside these."""
        return ROOM

    def _held(self) -> Store:
        """The store.

        Raises:
            CacheStateError: nothing was stored yet.
        """
        if self.store is None:
            raise CacheStateError(f"layer {self.layer_idx} of the cache is empty")
        return self.store

    def _read_from(self, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, T, D) of the tokens from `start` on, which were all kept so far."""
        store = self._held()
        if start == 0:
            return store.states
        longest = max(store.counts)
        slots = torch.arange(longest - (self.seen_tokens - start), longest, device=store.states[0].device)
        return store.take(slots.expand(store.states[0].shape[0], 1, -1))

    def _show_states(self) -> None:
        """Let `keys` and `values` be what the store shows, which it may have made anew."""
        self.keys, self.values = self._held().states

    def reserve(self) -> Slots:
        """Room for one more token of one row, for code that writes it by itself and then calls `advance`."""
        slots = self._held().reserve()
        self._show_states()
        return slots

    def advance(self) -> None:
        """Count the token that was written into what `reserve` gave."""
        self.seen_tokens += 1
        self._held().advance()
        self._show_states()

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over what is stored."""
        output = self._held().attend(attention, kwargs["module"], query, mask)
        self._show_states()
        return output

    def attend_shared(
        self,
        attention: AttentionFunction,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a later layer: over all of the prompt while it is read, then over what is stored."""
        if keys.shape[2] == self.seen_tokens:  # nothing was evicted before this pass
            return super().attend_shared(attention, query, keys, values, mask)
        return self._held().attend(attention, kwargs["module"], query, mask)

    def drop_last(self, num_removed: int) -> None:
        """Forget the last tokens, which came after anything was evicted."""
        self.seen_tokens -= num_removed
        self._held().crop(num_removed)
        self._show_states()

    def __copy__(self: L) -> L:
        """A layer that goes on from here alone; tensors are shared, since nothing that either sees is ever changed."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.store = copy.copy(self.store)
        return copied

    def lend(self: L, room: int) -> L:
        """A layer that goes on from here alone, and writes up to `room` tokens into this one's store; `Store.lend`."""
        lent = copy.copy(self)
        if self.store is not None:
            lent.store = self.store.lend(room)
            self._show_states()
            lent._show_states()
        return lent

    def let_go(self) -> None:
        """Free what is held; the tokens go on being counted."""
        self.store = self.keys = self.values = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.store, self.seen_tokens = None, 0

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
        if self.store is not None:
            self.store.map_rows(function)
            self._show_states()


def layers_nbytes(layers: Sequence[Any]) -> int:
    """Bytes of the storages behind the keys and values of cache layers."""
    tensors: list[Tensor | None] = []
    for layer in layers:
        own = isinstance(layer, StoredLayer)
        tensors += layer.tensors if own else [getattr(layer, name, None) for name in ("keys", "values")]
    return storage_nbytes(tensors)
