"""When a compiled step runs: one token at a time, on a cache whose prompt has been read."""

import functools
import time
import weakref
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from compresskv.cache import CompressedCache
from compresskv.compiled.package import Facts, NotCompilableError, Package, Progress, built_facts, load_package
from compresskv.compiled.step import EVEN, RAGGED, SLIDING, StepInputs
from compresskv.errors import ConfigError
from compresskv.layer import CompressedLayer

NEVER, AUTO, ALWAYS = "never", "auto", "always"
MODES = (NEVER, AUTO, ALWAYS)

_STEP_ARGUMENTS = {
    "input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "cache_position", "logits_to_keep",
    "return_dict",
}  # fmt: skip

_loaded: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, ...], Package]] = weakref.WeakKeyDictionary()


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ConfigError: naming it.
    """
    if mode not in MODES:
        raise ConfigError(f"compile={mode!r} must be one of {', '.join(MODES)}")


class CompiledDecoding(AbstractContextManager["CompiledDecoding"]):
    """While it is open, `model` reads single tokens on `cache` by a compiled step.

    Everything else, such as prompts, batches and padded rows, goes the usual way, and both ways may alternate: a step
    writes what it adds into the cache's own tensors.
    """

    def __init__(
        self, model: PreTrainedModel, cache: CompressedCache, mode: str, on_progress: Progress | None = None
    ) -> None:
        """Nothing is compiled or loaded yet.

        Args:
            mode: 'always' compiles at the first token where that was not done before; 'auto' never compiles, and loads
                what is there once decoding has taken as long as loading will.
        Raises:
            ConfigError: an unknown mode.
        """
        check_mode(mode)
        self._model = model
        self._cache = cache
        self._mode = mode
        self._on_progress = on_progress
        self._eager_s = 0.0
        self._package: Package | None = None
        self._facts: Facts | None = None

    def __enter__(self) -> "CompiledDecoding":
        """Take the place of the model's `forward`."""
        self._outer = self._model.__dict__.get("forward")
        self._eager = self._model.forward
        self._model.forward = functools.wraps(self._eager)(functools.partial(self._forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the model its `forward` back."""
        if self._outer is None:
            del self._model.forward
        else:
            self._model.forward = self._outer

    def prepare(self) -> None:
        """Find the compiled step now, after a prompt, rather than at the next token; with 'always', build it."""
        if self._mode == ALWAYS and not any(layer.in_prefill for layer in self._cache.compressed_layers):
            self._find_package()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("past_key_values") is not self._cache or not self._is_step(**kwargs):
            self._package = None  # after another prompt, another one may be needed
            return self._eager(*args, **kwargs)
        start = time.perf_counter()
        if (package := self._find_package()) is None:
            output = self._eager(**kwargs)
            self._eager_s += time.perf_counter() - start
            return output
        return self._run(package, kwargs["input_ids"], kwargs.get("position_ids"))

    def _is_step(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = True,
        return_dict: bool | None = True,
        **others: Any,
    ) -> bool:
        """Whether this is one sequence's next token, and nothing unusual is asked for."""
        return (
            input_ids is not None
            and input_ids.shape == (1, 1)
            and all(name in _STEP_ARGUMENTS or value is None for name, value in others.items())
            and (position_ids is None or position_ids.shape == (1, 1))
            and use_cache is not False
            and return_dict is not False
            and not torch.is_grad_enabled()
            and not any(layer.in_prefill or layer.has_unused for layer in self._cache.compressed_layers)
            and (attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all())))
        )

    def _find_package(self) -> Package | None:
        """The compiled step, if it is time for it."""
        if self._package is None and self._cache.not_compiled is None:
            start = time.perf_counter()
            try:
                self._package = self._get_package(_kinds(self._cache))
            except NotCompilableError as error:
                self._cache.not_compiled = str(error)
            self._cache.compile_s += time.perf_counter() - start
        return self._package

    def _get_package(self, kinds: tuple[str, ...]) -> Package | None:
        """From memory, from disk, or built.

        Raises:
            NotCompilableError: there is none.
        """
        if self._model.device.type != "cpu":
            raise NotCompilableError(
                f"compiled steps are made for CPUs so far, and the model is on {self._model.device}"
            )
        known = _loaded.setdefault(self._model, {})
        package = known.get(kinds)
        if package is not None and package.fits(self._model):
            return package
        if self._mode == AUTO:
            self._facts = self._facts or built_facts(self._model, kinds)
            if self._facts is None:
                raise NotCompilableError("it was not compiled for this model before: 'compresskv compile' does that")
            if self._eager_s < self._facts.load_s:  # at worst, loading then doubles the time
                return None
        known[kinds] = load_package(self._model, kinds, self._on_progress)
        return known[kinds]

    def _run(self, package: Package, token: Tensor, position: Tensor | None) -> CausalLMOutputWithPast:
        if position is None:
            position = torch.full((1, 1), self._cache.get_seq_length(), device=token.device)
        logits, sliding = package(_gather_inputs(self._cache, token, position, package.kinds))
        _store(self._cache, sliding)
        self._cache.num_compiled_steps += 1
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self._cache)


def _kinds(cache: CompressedCache) -> tuple[str, ...]:
    """Of each layer.

    Raises:
        NotCompilableError: one is of none.
    """
    full = RAGGED if any(layer.ragged is not None for layer in cache.compressed_layers) else EVEN
    kinds = []
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            kinds.append(full)
        elif type(layer) is DynamicSlidingWindowLayer:
            kinds.append(SLIDING)
        else:
            raise NotCompilableError(f"{type(layer).__name__} is not supported")
    return tuple(kinds)


def _gather_inputs(cache: CompressedCache, token: Tensor, position: Tensor, kinds: tuple[str, ...]) -> StepInputs:
    """Make room for one token in every layer, and name where it goes."""
    layers: list[Any] = cache.layers
    keys, values, starts, ends = [], [], [], []
    unused = [0] * cache.compressed_layers[0].stored()[0].shape[1]
    for layer, kind in zip(layers, kinds, strict=True):
        if kind == SLIDING:
            held, own_starts, own_ends = [layer.keys.contiguous(), layer.values.contiguous()], unused, unused
        else:
            held, own_starts, own_ends = layer.reserve_token()
            if kind == RAGGED:
                held = [states.view(1, -1, states.shape[-1]) for states in held]
        keys.append(held[0])
        values.append(held[1])
        starts.append(own_starts)
        ends.append(own_ends)
    device = token.device
    return StepInputs(
        token, position, torch.tensor(starts, device=device), torch.tensor(ends, device=device), keys, values
    )


def _store(cache: CompressedCache, sliding: list[Tensor]) -> None:
    """Count the new token in every layer."""
    states = iter(sliding)
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, CompressedLayer):
            layer.advance()
        else:
            layer.cumulative_length += 1
            layer.keys, layer.values = (next(states)[:, :, 1 - layer.sliding_window :] for _ in range(2))
