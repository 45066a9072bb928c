"""Compile a model's decode step and try it, so that later answers find it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.cache.cache import CompressedCache
from compresskv.compiled.modes import ALWAYS
from compresskv.compression import Compressing
from compresskv.methods.base import Method
from compresskv.models.decoding import decode_one_token, prefill
from compresskv.models.place import devices_of
from compresskv.selection.precision import NATIVE
from compresskv.system.clock import now
from compresskv.system.progress import Progress

_STEPS = 20


@dataclass(frozen=True)
class Trial:
    """What was found."""

    compile_s: float
    """Building it; where it was there, loading it."""
    eager_ms: float
    """Milliseconds of a decode step without it."""
    compiled_ms: float | None
    """With it; None where there is none."""
    not_compiled: str | None
    """Why there is none."""


def try_compiled(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: Method,
    budget: int,
    store: str = NATIVE,
    on_progress: Progress | None = None,
) -> Trial:
    """Read a prompt (1, T), then generate from it without and with a compiled step.

    Which step is needed depends on whether the method's KV heads keep different numbers of tokens, and on the store.
    """
    with Compressing(model, method, budget, store=store) as cache:
        eager_ms = _median_ms(_decoding(model, input_ids, cache), *devices_of(model))
    compressed = Compressing(model, method, budget, store=store, compile=ALWAYS, on_progress=on_progress)
    with compressed as cache:
        advance = _decoding(model, input_ids, cache)
        compressed.prepare_decoding()
        compiled_ms = _median_ms(advance, *devices_of(model))
    if cache.num_compiled_steps < _STEPS:
        return Trial(cache.compile_s, eager_ms, None, cache.not_compiled or "the method looks ahead")
    return Trial(cache.compile_s, eager_ms, compiled_ms, cache.not_compiled)


def _decoding(model: PreTrainedModel, input_ids: Tensor, cache: CompressedCache) -> Callable[[], None]:
    token = int(prefill(model, input_ids, cache).argmax())

    def advance() -> None:
        nonlocal token
        token = int(decode_one_token(model, token, cache).argmax())

    return advance


def _median_ms(advance: Callable[[], None], *devices: torch.device) -> float:
    seconds = list[float]()
    for _ in range(_STEPS):
        start = now(*devices)
        advance()
        seconds.append(now(*devices) - start)
    return 1e3 * sorted(seconds)[_STEPS // 2]
