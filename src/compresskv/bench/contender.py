"""What reads a prompt and goes on from it: plain transformers, and our caches."""

import functools
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compresskv.attention.routing import routing
from compresskv.bench.continuation import Continuation, Prefill
from compresskv.cache.cache import CompressedCache
from compresskv.cache.stored import layers_nbytes
from compresskv.cache.timing import EvictionTimer
from compresskv.compiled.decoding import CompiledDecoding
from compresskv.compiled.modes import ALWAYS
from compresskv.compression import Compressing
from compresskv.methods.base import Method
from compresskv.models.decoding import decode_one_token, prefill
from compresskv.models.place import devices_of
from compresskv.models.shape import decoder_config
from compresskv.selection.budgets import SharedBudget
from compresskv.selection.precision import NATIVE
from compresskv.system.clock import now

PLAIN = "plain"
EAGER, COMPILED, INT8 = "eager", "compiled", "int8"
"""How tokens are generated: by PyTorch, by a compiled step, by one that reads 8-bit weights."""


class Contender(Protocol):
    """One line of a table."""

    @property
    def method(self) -> str:
        """'plain', a method with its options, or a peer's name."""

    @property
    def budget(self) -> SharedBudget | None:
        """Tokens, a share of the prompt, or bytes; None keeps all."""

    @property
    def max_prompt(self) -> int | None:
        """Read no more of the prompt than that many tokens; None: all."""

    @property
    def decode(self) -> str:
        """'eager', 'compiled' or 'int8'."""

    @property
    def store(self) -> str:
        """In how many bits a number it holds what it keeps."""

    @property
    def model(self) -> PreTrainedModel | None:
        """Its own instead of the one that all share."""

    def start(self, model: PreTrainedModel, input_ids: Tensor) -> Continuation:
        """Read the tokens (1, T)."""


@dataclass(frozen=True)
class Plain:
    """transformers alone: its own attention function and its own cache."""

    max_prompt: int | None = None
    method: str = PLAIN
    budget: None = None
    decode: str = EAGER
    store: str = NATIVE
    model: None = None

    def start(self, model: PreTrainedModel, input_ids: Tensor) -> Continuation:
        """Read the tokens (1, T)."""
        cache, devices = DynamicCache(config=decoder_config(model)), devices_of(model)
        start = now(*devices)
        logits = prefill(model, input_ids, cache)
        read = now(*devices)
        first = int(logits.argmax())
        figures = Prefill(
            prompt_tokens=input_ids.shape[1],
            held_tokens=float(input_ids.shape[1]),
            prefill_s=read - start,
            scoring_s=0.0,
            eviction_s=0.0,
            num_scorings=0,
            first_token_s=now(*devices) - start,
            kv_nbytes=layers_nbytes(cache.layers),
        )
        return Continuation(figures, first, lambda token: _next(model, token, cache), nullcontext)


@dataclass(frozen=True)
class Ours:
    """A method at a budget."""

    method: str
    prepared: Method
    budget: SharedBudget | None
    max_prompt: int | None = None
    decode: str = EAGER
    store: str = NATIVE
    model: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    def start(self, model: PreTrainedModel, input_ids: Tensor) -> Continuation:
        """Read the tokens (1, T)."""
        model = self.model or model
        devices = devices_of(model)
        timer, budget = EvictionTimer(*devices), 1 if self.budget is None else self.budget  # `Full` ignores it
        with Compressing(model, self.prepared, budget, observer=timer, store=self.store) as cache:
            start = now(*devices)
            logits = prefill(model, input_ids, cache)
            read = now(*devices)
            first = int(logits.argmax())
            first_s = now(*devices) - start
        layers = cache.compressed_layers
        figures = Prefill(
            prompt_tokens=input_ids.shape[1],
            held_tokens=sum(layer.num_retained for layer in layers) / len(layers),
            prefill_s=read - start,
            scoring_s=timer.scoring.seconds,
            eviction_s=timer.eviction.seconds,
            num_scorings=timer.scoring.num_runs,
            first_token_s=first_s,
            kv_nbytes=cache.nbytes,
        )
        open_context = (lambda: routing(model)) if self.decode == EAGER else _Compiled(model, cache)
        advance = functools.partial(_next, model, cache=cache)
        return Continuation(figures, first, advance, open_context, lambda: cache.not_compiled)


class _Compiled:
    """Opens contexts in which a cache's tokens are read by a compiled step, which is there before time counts."""

    def __init__(self, model: PreTrainedModel, cache: CompressedCache) -> None:
        self._model = model
        self._decoding = CompiledDecoding(model, cache, ALWAYS)

    def __call__(self) -> ExitStack:
        """Enter one."""
        with ExitStack() as stack:
            stack.enter_context(routing(self._model))
            self._decoding.prepare()
            stack.enter_context(self._decoding)
            return stack.pop_all()


def _next(model: PreTrainedModel, token: int, cache: Any) -> int:
    return int(decode_one_token(model, token, cache).argmax())
