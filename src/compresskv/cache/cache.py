"""The KV cache that keeps only what a method chose."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from compresskv import defaults
from compresskv.attention.pieces import AUTO, PrefillMemory, piece_tokens
from compresskv.attention.routing import base_implementation
from compresskv.cache.adopt import adopted, check_adoptable
from compresskv.cache.candidates import CandidateStats, candidate_stats
from compresskv.cache.chunked import ChunkedCache
from compresskv.cache.conditions import Conditions, EvictionObserver, Unobserved
from compresskv.cache.crop import NO_ASSISTANT, check_other_crop
from compresskv.cache.eviction import Eviction
from compresskv.cache.full import branch
from compresskv.cache.generated import GeneratedEviction
from compresskv.cache.group import check_candidates
from compresskv.cache.layer import CompressedLayer
from compresskv.cache.routed import routed_layers
from compresskv.cache.stored import layers_nbytes
from compresskv.errors import CacheStateError, ConfigError, ModelError
from compresskv.methods.base import Method
from compresskv.models.chunks import GivenPrompt, is_generating, is_ignored, lacks_what_was_read
from compresskv.models.shape import decoder_config, shares_keys
from compresskv.selection import budgets
from compresskv.selection.auto_budget import AutoChoice
from compresskv.selection.cuts import Chunks, DecodeBudget, DecodeStats
from compresskv.selection.precision import NATIVE, find_precision
from compresskv.system.check import check_count


class CompressedCache(ChunkedCache):
    """The cache to pass as `past_key_values` inside `compressing`. One prompt at a time; `reset()` for the next.

    Full-attention layers are compressed. Sliding-window and linear-attention layers keep transformers' own layers:
    they are bounded already.
    """

    # transformers' assisted decoding and deferred stopping ask this before they rely on `crop`
    is_croppable = False

    layer_type: type[CompressedLayer] = CompressedLayer

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        budget: budgets.Budget,
        *,
        prompt_tokens: int | None = None,
        exact_prefill: bool | None = None,
        prefill_memory: PrefillMemory = AUTO,
        on_layer: Callable[[int, int], None] | None = None,
        observer: EvictionObserver | None = None,
        store: str = NATIVE,
        chunks: Chunks | None = None,
        decode: DecodeBudget | None = None,
        decode_method: Method | None = None,
        candidates: int | None = defaults.CANDIDATES,
    ) -> None:
        """Build an empty cache.

        Args:
            prompt_tokens: the prompt's length, where it is read in several forward passes; None: in the first one.
            exact_prefill, prefill_memory: as for `compressing`.
            on_layer: called in prefill with (layers done, layers).
            observer: told of every eviction, to time it.
            store, candidates: as for `compressing`.
            chunks: how the prompt is cut while it is read; None: at its end alone.
            decode: how what is generated is cut; None: it is kept.
            decode_method: that cuts it; None: `method`.
        Raises:
            ModelError: the model has no full-attention layer, or `chunks` or `decode` do not fit it.
            ConfigError: the budget, `prefill_memory` or `candidates` cannot work, or an unknown store.
        """
        budget = budgets.read_budget(budget)
        precision = find_precision(store)
        check_candidates(candidates)
        self._candidates, self._decides_later, self._decode = candidates, False, decode
        if decode is not None and (decode_method or method).decides_together:
            candidates, self._decides_later = None, True  # it goes on with the same tokens in all layers
        given: dict[str, Any] = {"prompt_tokens": prompt_tokens, "on_layer": on_layer, "chunks": chunks}
        given |= {"candidates": candidates, "observer": observer or Unobserved()}
        conditions = Conditions.of(model, budget, precision, **given)
        eviction = Eviction(method, budget, conditions)
        if (chunks is not None or decode is not None) and shares_keys(decoder_config(model)):
            raise ModelError("layers of this model attend to keys of others: leave out chunk_budget=N, decode_budget=N")
        generated = None
        if decode is not None:
            generated = GeneratedEviction(decode_method or method, decode, conditions)
        make = functools.partial(self.layer_type, model=model, eviction=eviction, generated=generated)
        super().__init__(routed_layers(model, make), eviction)
        # Without a mask, attention of later chunks is faster. A sliding window, and 'eager', need theirs.
        self._reads_maskless = conditions.num_layers == len(self.layers) and base_implementation(model) == "sdpa"
        if exact_prefill is not None:
            for layer in self.compressed_layers:
                layer.exact_prefill = exact_prefill
        self.method = method
        self.on_layer = on_layer
        self._given = GivenPrompt()
        self.piece_tokens = piece_tokens(model, prefill_memory)
        self.num_compiled_steps = 0
        """Tokens that were read by a compiled step."""
        self.compile_s = 0.0
        """Seconds spent on building or loading it."""
        self.not_compiled: str | None = None
        """Why steps are not compiled though that was asked for."""

    def __bool__(self) -> bool:
        """Whether anything was read.

        For a prompt beyond its first context length, Phi-3's `generate` replaces a cache that is true and shorter than
        that by a plain one: an empty cache that was true would never be used.
        """
        return self.get_seq_length() > 0

    def _check_goes_on(self, num_new: int) -> None:
        """Refuse, too, where the prompt ended before `prompt_tokens`, or another one begins.

        Raises:
            CacheStateError: as above.
        """
        super()._check_goes_on(num_new)
        layer = self.compressed_layers[0]
        unfinished = layer.in_prefill and layer.seen_tokens + 1 < layer.num_prompt_tokens
        if unfinished and num_new == 1 and is_generating():
            raise CacheStateError(
                f"prompt_tokens={layer.num_prompt_tokens}, but the prompt ended after {layer.seen_tokens} tokens: "
                "give its exact length"
            )
        if not layer.seen_tokens:
            self._given = GivenPrompt.now()
        elif not layer.in_prefill and (lacks_what_was_read() or self._given.is_another()):
            raise CacheStateError(
                f"this prompt does not begin with the {layer.seen_tokens} tokens that the cache has seen: "
                "reset() the cache before another prompt"
            )
        if num_new > 1 and is_ignored(self):
            raise CacheStateError(
                "generate reads its whole text at each step with use_cache=False: leave that out, or the cache"
            )

    @property
    def auto_choices(self) -> list[AutoChoice]:
        """For each row of the prompt, how much of it was kept and why, where the budget is 'auto'; empty before."""
        return self._eviction.choices

    @property
    def candidate_stats(self) -> CandidateStats | None:
        """How much layers held that waited for later ones; None where that was all, and nothing else was asked for."""
        layer = self.compressed_layers[0]
        if layer.in_prefill:
            return None
        num_prompt = layer.num_prompt_tokens
        return candidate_stats(self._eviction, self._candidates, num_prompt, decides_later=self._decides_later)

    @property
    def decode_stats(self) -> DecodeStats | None:
        """How what was generated was cut so far; None where that was not asked for."""
        generated = self.compressed_layers[0].generated
        if self._decode is None or generated is None:
            return None
        return self._decode.stats(generated.label, max(layer.num_answer_cuts for layer in self.compressed_layers))

    @torch.no_grad()
    def adopt(self, full: Cache, num_prompt_tokens: int | None = None) -> None:
        """Take over a prompt that was read with a full cache, and cut it; `full` stays as it is.

        For plans, and for methods without an observation window (queries are not in a cache). One prompt, no padding.

        Args:
            full: transformers' own cache, such as `DynamicCache`.
            num_prompt_tokens: how many of its tokens are the prompt; None: all. Later ones are kept.
        Raises:
            CacheStateError: this cache holds a prompt, or `full` does not hold one whole prompt of this model.
            ConfigError: the method needs queries.
            PlanError: the plan is of another prompt length.
        """
        if not isinstance(full, Cache):
            raise CacheStateError("must be a cache of transformers' own", option="full", value=type(full).__name__)
        check_count("num_prompt_tokens", num_prompt_tokens, or_none=True)
        num_tokens = full.get_seq_length()
        num_prompt = num_tokens if num_prompt_tokens is None else num_prompt_tokens
        if self.method.num_observed() or self.method.lookahead:
            raise ConfigError(f"method {self.method.name!r} needs queries, which a cache does not hold: make a plan")
        check_adoptable(full, num_prompt, self)
        try:
            self.layers = [
                adopted(source, layer, num_prompt, num_tokens)
                for source, layer in zip(full.layers, self.layers, strict=True)
            ]
        except BaseException:
            self.reset()
            raise

    def begin_part(
        self,
        model: PreTrainedModel,
        num_tokens: int,
        method: Method,
        budget: budgets.Budget,
        *,
        left: Sequence[float] | None = None,
        replayed: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Read on: the next `num_tokens` tokens, of one row, are cut as a prompt of its own once they were read.

        They attend to what is held of earlier parts, and to one another.

        Args:
            budget: of the part.
            left: for each full-attention layer, how much of what is held of earlier parts stays in each KV head then;
                None: all. See `Part`.
            replayed: for each full-attention layer, as in `LayerInputs`.
        Raises:
            ConfigError: the budget cannot work.
        """
        is_first, layers = self.get_seq_length() == 0, self.compressed_layers
        conditions = self._eviction.conditions.of_part(model, budget, num_tokens, is_first=is_first)
        eviction = Eviction(method, budget, conditions)
        shares = left or [1.0] * len(layers)
        for layer, share, own in zip(layers, shares, replayed or [None] * len(layers), strict=True):
            layer.begin_part(eviction, share, own)
        self.method = method

    @torch.no_grad()
    def branch(self, room: int | None = None) -> "CompressedCache":
        """A cache that goes on from here and leaves this one as it is, without copying keys and values.

        Args:
            room: None: its first token copies what is held, as it must where several go on at a time. Else the tokens
                that are written behind what is held, in this cache's own tensors: for one branch at a time; while it
                is in use, this cache must not grow.
        """
        branched: CompressedCache = branch(self)
        if room is not None:
            branched.layers = [
                own.lend(room) if isinstance(own, CompressedLayer) else other
                for own, other in zip(self.layers, branched.layers, strict=True)
            ]
        branched.num_compiled_steps, branched.compile_s, branched.not_compiled = 0, 0.0, None
        return branched

    def crop(self, max_length: int) -> None:
        """Remove generated tokens from the end; see `CompressedLayer.crop`.

        Raises:
            CacheStateError: a layer cannot do that; none is changed then.
        """
        first = self.compressed_layers[0]
        removed = first.seen_tokens - first.check_crop(max_length)
        if removed:
            for layer_idx, layer in enumerate(self.layers):
                if isinstance(layer, CompressedLayer):
                    layer.check_crop(-removed)
                else:
                    check_other_crop(layer_idx, layer, removed)
            super().crop(-removed)

    def activate_past_recording(self) -> None:
        """Refuse: newer transformers call this before assisted decoding reads the prompt.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(f"a compressed cache cannot take drafts back out of its prompt. {NO_ASSISTANT}")

    def reset(self) -> None:
        """Forget everything; the next forward pass is a new prompt. Tokens and seconds go on being counted."""
        self.not_compiled = None  # the next prompt may need another step
        self._given = GivenPrompt()
        super().reset()  # type: ignore[no-untyped-call]
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # older transformers leave zeros that count as tokens
                layer.keys = layer.values = None
                layer.is_initialized = False

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that keys and values hold now, in all layers."""
        return layers_nbytes(self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that the cache held, or would have held, for the whole prompt before eviction."""
        return self._other_nbytes + sum(layer.full_nbytes for layer in self.compressed_layers)

    @property
    def retained_nbytes(self) -> int:
        """Bytes that the cache held right after eviction; where nothing was evicted yet, those that it holds now."""
        return self._other_nbytes + sum(layer.retained_nbytes for layer in self.compressed_layers)

    @property
    def _other_nbytes(self) -> int:
        """Bytes that the layers hold which are not compressed."""
        return layers_nbytes([layer for layer in self.layers if not isinstance(layer, CompressedLayer)])
