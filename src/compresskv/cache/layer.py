"""One compressed layer: what it does with a prompt."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.chunks import check_ends, check_unpadded
from compresskv.attention.plain import AttentionFunction
from compresskv.cache.crop import cropped_length
from compresskv.cache.eviction import Eviction
from compresskv.cache.generated import GeneratedEviction
from compresskv.cache.held import HeldOf
from compresskv.cache.part import Part, PartOf
from compresskv.cache.stored import StoredLayer
from compresskv.cache.stores.base import Store
from compresskv.cache.stores.dense import DenseStore
from compresskv.cache.stores.masks import valid_keys
from compresskv.cache.stores.retain import retained
from compresskv.cache.window import QueryWindow
from compresskv.errors import CacheStateError
from compresskv.methods.inputs import FUTURE_POSITIONS, LayerInputs
from compresskv.models.chunks import chunked_prompt_length
from compresskv.models.shape import decoder_config
from compresskv.selection.budgets import is_share
from compresskv.selection.precision import NATIVE, PRECISIONS, Precision
from compresskv.selection.select import EMPTY_SLOT


class CompressedLayer(StoredLayer):
    """One full-attention layer. It stores all of the prompt, attends to all of it, then evicts and frees the rest."""

    def __init__(
        self,
        layer_idx: int,
        position: int,
        model: PreTrainedModel,
        eviction: Eviction,
        generated: GeneratedEviction | None = None,
    ) -> None:
        super().__init__(layer_idx, decoder_config(model))
        self.generated = generated
        """How what comes after the prompt is cut; None: it is kept."""
        self._position = position
        self._eviction = eviction
        self._forget_prompt()

    def _forget_prompt(self) -> None:
        self.num_prompt_tokens = self._eviction.conditions.prompt_tokens or 0
        """Of the prompt alone; 0 where it is not known yet."""
        self._decided_at: int | None = None
        """Tokens seen when the method chose, those that it looked ahead at included."""
        self.full_nbytes = 0
        """Bytes of the prompt's keys and values before eviction."""
        self._retained_nbytes = 0
        self._part: Part | None = None
        self._cut_at, self.num_answer_cuts = 0, 0
        """The last cut, by the tokens that were read then; and how many cuts of what was generated found too much."""
        self.strengths: Tensor | None = None
        self._window: QueryWindow | None = None

    @property
    def precision(self) -> Precision:
        """What is kept is held in so many bits."""
        return self._eviction.conditions.precision

    @property
    def in_prefill(self) -> bool:
        """Whether everything is held still: the prompt, or what the method looks ahead at, was not all read."""
        return self._decided_at is None

    @property
    def mean_retained(self) -> float:
        """Prompt tokens kept, without those looked ahead at: a mean over rows and KV heads."""
        num_prompt = min(self.seen_tokens, self.num_prompt_tokens or self.seen_tokens)
        if self.store is None or self.positions is None:
            return num_prompt
        held = self.store.positions
        kept = (held != EMPTY_SLOT) & (held < num_prompt)
        return float(kept.sum(dim=-1).float().mean())

    @property
    def retained_nbytes(self) -> int:
        """Bytes of what was held right after eviction; before that, of what is held now."""
        return self.nbytes if self.in_prefill else self._retained_nbytes

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over what is stored; the end of prefill evicts."""
        output = super().attend(attention, query, mask, **kwargs)
        if self.in_prefill:
            self.observe(QueryWindow.given(query, **kwargs), valid_keys(mask))
        elif self.generated is not None:
            self._observe_generated(self.generated, QueryWindow.given(query, **kwargs), mask)
        return output

    @property
    def _room(self) -> int:
        return self.num_to_come if self.in_prefill else super()._room

    @torch.no_grad()
    def observe(self, window: QueryWindow, valid: Tensor | None) -> None:
        """Note the queries of what was read last; evict once the prompt, and what the method looks ahead at, is read.

        Args:
            valid: (B, seen) bool, False at padding; None where nothing is padded.
        """
        eviction, lookahead = self._eviction, self._eviction.method.lookahead
        if not (self.num_prompt_tokens and lookahead):
            known = self.num_prompt_tokens or chunked_prompt_length() or 0
            self.num_prompt_tokens = max(self.seen_tokens + self.num_to_come + eviction.num_later, known)
        num_prompt = min(self.num_prompt_tokens, self.seen_tokens)
        self.full_nbytes = num_prompt * sum(
            states.shape[0] * states.shape[1] * states.shape[3] * states.element_size()
            for states in self._held().states
        )
        num_ahead = self.seen_tokens - num_prompt
        self._window = window.following(self._window).last(eviction.method.num_observed(num_ahead))
        if cuts := eviction.cuts(self.num_prompt_tokens):
            check_ends(cuts, self._cut_at, self.seen_tokens)
            check_unpadded(valid)
            valid = None
        if self.seen_tokens >= self.num_prompt_tokens + lookahead:
            self.end_prefill(self._window, valid, num_ahead)
        elif self.seen_tokens in cuts and not eviction.awaits_end:
            self.cut_chunk(self._window)
        if num_ahead == 0 and not eviction.method.replays:  # who reads twice tells
            self._tell(cuts)

    def _tell(self, cuts: Iterable[int]) -> None:
        """Tell whoever asked how many layers were read, each as often as it is cut."""
        conditions, passed = self._eviction.conditions, [end < self.seen_tokens for end in cuts]
        if conditions.on_layer is not None:
            num_before = sum(passed) * conditions.num_layers
            conditions.on_layer(num_before + self._position + 1, (len(passed) + 1) * conditions.num_layers)

    def cut_chunk(self, window: QueryWindow) -> None:
        """Cut what is held, before the prompt's end, by what these queries attend to."""
        self._cut_at, cut = self.seen_tokens, self._eviction.cuts(self.num_prompt_tokens)[self.seen_tokens]
        self._eviction.end_of_prompt(HeldOf(self), self._position, self._inputs(window, None), cut=cut)

    def observes_next(self) -> bool:
        """Whether the next token's queries are looked at, to cut what was generated."""
        generated = self.generated
        return generated is not None and self._num_generated + 1 > generated.interval - max(1, generated.window_size)

    @property
    def _num_generated(self) -> int:
        """Tokens since the prompt's end, or since the last cut."""
        return self.seen_tokens - self._cut_at

    @torch.no_grad()
    def _observe_generated(self, generated: GeneratedEviction, window: QueryWindow, mask: Tensor | None) -> None:
        """Note the queries of the last tokens before a cut; cut when enough were read."""
        if self._num_generated > generated.interval - max(1, generated.window_size):
            self._window = window.following(self._window).last(generated.window_size)
        if self._num_generated >= generated.interval and not self.num_to_come:
            observed, self._window = self._window, None
            assert observed is not None
            self._cut_at = self.seen_tokens
            self.num_answer_cuts += generated.cut(self, self._position, observed, valid_keys(mask))

    def pass_by(self) -> None:
        """Attend to what is held and what comes, and evict nothing: for a branch that is thrown away."""
        self._decided_at, self.generated = self.seen_tokens, None

    def end_prefill(self, window: QueryWindow, valid: Tensor | None, num_ahead: int) -> None:
        """Let the method choose what stays of all that is stored, now or when it can."""
        self._window, self._decided_at = None, self.seen_tokens
        self._retained_nbytes = self.nbytes
        part, method = self._part, self._eviction.method
        inputs = self._inputs(window, valid, num_ahead, 0 if part is None else part.start)
        num_queries = window.queries.shape[2]
        if method.observes_all and num_queries < inputs.keys.shape[2]:
            raise CacheStateError(f"method {method.name!r} needs the queries of the whole prompt, not {num_queries}")
        if part is not None:
            self._eviction.end_of_prompt(PartOf(self, part), self._position, inputs)
        elif self._cut_at:
            num_evicted = self.seen_tokens - inputs.keys.shape[2]
            self._eviction.end_of_prompt(HeldOf(self), self._position, inputs, num_evicted=num_evicted)
        else:
            self._eviction.end_of_prompt(self, self._position, inputs)
        self._cut_at = self.seen_tokens

    def _inputs(self, window: QueryWindow, valid: Tensor | None, num_ahead: int = 0, start: int = 0) -> LayerInputs:
        """What the method may look at: of all that is stored, or of the tokens from `start` on."""
        rotations, part, method = self._eviction.conditions.rotations, self._part, self._eviction.method
        assert rotations is not None
        keys, values = self._read_from(start)
        num_positions = self.seen_tokens + FUTURE_POSITIONS
        return LayerInputs(
            self.layer_idx,
            window.queries,
            keys,
            values,
            window.scaling,
            window.softcap,
            None if valid is None else valid[:, start:],
            sinks=window.sinks,
            num_ahead=num_ahead,
            replayed=window.replayed if part is None or part.replayed is None else part.replayed,
            rotation=rotations.of(self.layer_idx, num_positions, keys.device) if method.turns_back else None,
            first_position=start,
            positions=self._held().positions if self._cut_at and part is None else None,
            ahead=rotations.ahead(self.layer_idx, self.seen_tokens, keys, valid) if method.turns_ahead else None,
        )

    def begin_part(self, eviction: Eviction, left: float, replayed: Tensor | None) -> None:
        """Read on; what comes is cut as a prompt of its own, beside what was kept before. See `Part`."""
        ranked = not is_share(eviction.budget)  # of a share, earlier parts keep theirs
        self._eviction, self._part = eviction, Part(self.seen_tokens, left, ranked, replayed)
        self._decided_at, self._window = None, None
        self.num_prompt_tokens = self.seen_tokens + (eviction.conditions.prompt_tokens or 0)

    def adopt_prompt(self, keys: Tensor, values: Tensor) -> None:
        """Take a prompt's keys and values (B, H_kv, T, D) that were computed elsewhere; `observe` comes next."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.store, self.seen_tokens, self.num_prompt_tokens = DenseStore(keys, values), keys.shape[2], keys.shape[2]
        self._show_states()

    def adopt_store(self, store: Store) -> None:
        """Hold what is left of a prompt that was read and cut elsewhere."""
        self.store, self.seen_tokens = store, store.held.num_seen
        self.num_prompt_tokens = self._decided_at = self.seen_tokens
        self._show_states()
        assert self.keys is not None
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def adopt_retained(self, keys: Tensor, values: Tensor, tokens: Tensor) -> None:
        """Take a prompt's keys and values (B, H_kv, T, D), and keep of each row the tokens that were chosen for it.

        Args:
            tokens: as for `retain`.
        """
        self.adopt_prompt(keys, values)
        self._decided_at, self.full_nbytes = self.seen_tokens, self.nbytes
        self.retain(tokens)

    def adopt_generated(self, keys: Tensor, values: Tensor) -> None:
        """Take keys and values (B, H_kv, T_new, D) of tokens that came after an adopted prompt."""
        self._append(keys, values)
        self._show_states()

    def retain(self, tokens: Tensor, scores: Tensor | None = None) -> None:
        """Keep the named tokens and free the memory of all others; of what is kept, more may be evicted later.

        Args:
            tokens: (B, H, R) int64, ascending positions of tokens that are stored, H being 1 or the number of KV heads;
                `EMPTY_SLOT` begins what keeps fewer.
            scores: what they were chosen by; not kept.
        Raises:
            CacheStateError: a token is not stored.
        """
        precision = PRECISIONS[NATIVE] if self.in_prefill else self._eviction.conditions.precision
        self.store, self.strengths = retained(self._held(), tokens, precision), None
        self._show_states()
        self._retained_nbytes = self.nbytes

    def hold(self, tokens: Tensor) -> None:
        """Free the memory of all but the named tokens; `retain` names later which of these stay.

        Args:
            tokens: as for `retain`.
        """
        self.store = retained(self._held(), tokens, PRECISIONS[NATIVE])
        self._show_states()

    def check_crop(self, max_length: int) -> int:
        """The length that `crop` would leave; see `cropped_length`."""
        return cropped_length(self, max_length, self._decided_at)

    def crop(self, max_length: int) -> None:
        """Remove generated tokens from the end.

        Args:
            max_length: negative, the number of tokens to remove (as transformers 5.23 means it); or the length to
                keep, as seen tokens (as 5.2 does).
        Raises:
            CacheStateError: nothing was generated since the prompt, or it would cut into the prompt, or into tokens
                of which some were evicted.
        """
        length = self.check_crop(max_length)
        if removed := self.seen_tokens - length:
            self.drop_last(removed)
            if self._window is not None:  # while looking ahead
                self._window = self._window.cropped(removed)

    def reset(self) -> None:
        """Forget everything; the next forward pass is a new prompt."""
        super().reset()
        self._forget_prompt()
        self._eviction.reset()

    def _map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(function)
        if self._window is not None:  # while looking ahead
            self._window = self._window.of_rows(function)
