"""When a compiled step runs: one token at a time, on a cache whose prompt has been read."""

import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from compresskv.cache.cache import CompressedCache
from compresskv.cache.layer import CompressedLayer
from compresskv.compiled.compilable import NotCompilableError, check_compilable, has_hooks
from compresskv.compiled.graph import GraphedStep
from compresskv.compiled.inputs import Places, gather_inputs, kinds_of, store_new_token
from compresskv.compiled.modes import ALWAYS, AUTO, check_mode
from compresskv.compiled.package import Package, build_times, load_package
from compresskv.compiled.step import StepInputs
from compresskv.models.arguments import CACHE, CACHE_NAMES, given_cache
from compresskv.models.place import input_device
from compresskv.system.clock import now
from compresskv.system.progress import Progress

_STEP_ARGUMENTS = {
    "input_ids", "position_ids", "attention_mask", "use_cache", "cache_position", "logits_to_keep",
    "return_dict", *CACHE_NAMES,
}  # fmt: skip

_RECORDING_S = 0.2
"""What recording a CUDA graph may take, about: 'auto' records once decoding has taken as long."""


class Program(Protocol):
    """Runs a `Step`."""

    kinds: tuple[str, ...]
    """Of the layers that it was made for."""
    record_s: float
    """Seconds that its calls spent on preparing later ones."""

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
        """As `Step.forward`."""

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model still has the tensors that this was made with: it may have been moved or converted."""


_loaded: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, ...], Package]] = weakref.WeakKeyDictionary()


_lock = threading.Lock()
_open: weakref.WeakKeyDictionary[PreTrainedModel, list["CompiledDecoding"]] = weakref.WeakKeyDictionary()
"""Contexts that a model's `forward` hands calls to. They need not end in the order in which they began."""
_own_forward: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()
"""What stood in the place of the class's `forward` before, of models that had such."""


def records_steps(model: PreTrainedModel) -> bool:
    """Whether the model's steps are recorded, as on a CUDA device: without a compiler, and in little time."""
    return input_device(model).type == "cuda"


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
        self.cache = cache
        self._mode = mode
        self._on_progress = on_progress
        self.eager_s = 0.0
        """Seconds of decoding without a compiled step; whoever decodes again and again carries them over."""
        self._program: Program | None = None
        self._is_checked = False
        """Whether nothing but steps was read since the program was found to fit the model."""
        self._whole_columns = 0
        """Of the last mask that was found, or taken, to hide nothing."""
        self._padded_columns = 0
        """Of the last one that was found to hide something."""
        self._places = Places()
        self._load_s: dict[tuple[str, ...], float] = {}

    def __enter__(self) -> "CompiledDecoding":
        """Let the model's `forward` hand this cache's calls over."""
        with _lock:
            if self._model not in _open:
                _open[self._model] = []
                eager = self._model.forward
                if "forward" in self._model.__dict__:
                    _own_forward[self._model] = eager
                self._model.forward = functools.wraps(eager)(functools.partial(_dispatch, _open[self._model], eager))
            _open[self._model].append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The last one gives the model its own `forward` back."""
        with _lock:
            _open[self._model].remove(self)
            if not _open[self._model]:
                del _open[self._model]
                if self._model in _own_forward:
                    self._model.forward = _own_forward.pop(self._model)
                else:
                    del self._model.forward

    def prepare(self) -> None:
        """Find the compiled step now, after a prompt, rather than at the next token; with 'always', build it."""
        if self._mode == ALWAYS and not any(layer.in_prefill for layer in self.cache.compressed_layers):
            self._find_program()

    def forward(self, eager: Callable[..., Any], **kwargs: Any) -> Any:
        """Read what `eager`, the model's own `forward`, would read on this cache."""
        if not self._is_step(**kwargs):
            self._is_checked, self._whole_columns = False, 0
            if self.cache.not_compiled is None and self._is_uneven():
                self.cache.not_compiled = "rows of the batch hold different numbers of tokens"
            if kwargs.get("input_ids") is None or kwargs["input_ids"].shape[-1] != 1:
                self._padded_columns = 0
            return eager(**kwargs)
        start = now()
        if (program := self._find_program()) is not None:
            try:
                return self._run(program, kwargs["input_ids"], kwargs.get("position_ids"))
            except NotCompilableError as error:  # only once it runs does a recording tell
                self._program, self.cache.not_compiled = None, str(error)
        output = eager(**kwargs)
        self.eager_s += now() - start
        return output

    def _is_step(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = True,
        return_dict: bool | None = True,
        **others: Any,
    ) -> bool:
        """Whether this is the next token of each row, and nothing unusual is asked for."""
        config = self._model.config
        return (
            input_ids is not None
            and input_ids.ndim == 2
            and input_ids.shape[1] == 1
            and (len(input_ids) == 1 or self._records)
            and all(name in _STEP_ARGUMENTS or value is None for name, value in others.items())
            and (position_ids is None or position_ids.shape == input_ids.shape)
            and use_cache is not False
            and return_dict is not False
            and not any(getattr(config, name, False) for name in ("output_hidden_states", "output_attentions"))
            and getattr(config, "return_dict", True)
            and not (
                torch.is_grad_enabled()
                or torch.is_autocast_enabled(input_device(self._model).type)
                or self._model.training
            )
            and (attention_mask is None or self._hides_nothing(attention_mask))
            and self._are_ready(len(input_ids))
        )

    @property
    def _records(self) -> bool:
        """Whether steps are recorded, not compiled: that takes several rows, too."""
        return records_steps(self._model)

    def _hides_nothing(self, mask: Any) -> bool:
        """Whether a mask is all ones.

        On a GPU that is read once after each prompt, since the answer has to be waited for: a mask that is longer by
        the new token is then taken to have grown by a one, as `generate` makes it.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return False
        if mask.device.type != "cpu" and mask.shape[1] == self._padded_columns + 1:
            self._padded_columns += 1
            return False
        is_known = mask.device.type != "cpu" and mask.shape[1] == self._whole_columns + 1
        if not is_known and not bool(mask.all()):
            self._padded_columns = mask.shape[1]
            return False
        self._whole_columns = mask.shape[1]
        return True

    def _is_uneven(self) -> bool:
        """Whether layers have cut their prompt so that some slots are empty."""
        return any(layer.has_empty_slots and not layer.in_prefill for layer in self.cache.compressed_layers)

    def _are_ready(self, num_rows: int) -> bool:
        dtype = self._model.dtype  # which looks through its modules
        return all(self._is_ready(layer, num_rows, dtype) for layer in self.cache.layers)

    def _is_ready(self, layer: Any, num_rows: int, dtype: torch.dtype) -> bool:
        """Whether a layer holds as many rows, in the model's dtype, after its prompt."""
        if isinstance(layer, CompressedLayer) and (layer.in_prefill or layer.has_empty_slots or layer.observes_next()):
            return False
        if not isinstance(layer, DynamicLayer):
            return True  # of no kind that can be compiled: `kinds_of` says so, once
        keys = layer.keys
        least = 0
        if isinstance(layer, DynamicSlidingWindowLayer):  # what the program was traced with; a recording: all it sees
            least = layer.sliding_window - 1 if self._records else 2
        if keys is None or keys.shape[2] < least:
            return False
        return keys.shape[0] == num_rows and keys.dtype == dtype

    def _find_program(self) -> Program | None:
        """The compiled step, if it is time for it."""
        if self.cache.not_compiled is None:
            start = now()
            try:
                kinds = kinds_of(self.cache)  # another prompt may need another
                if not self._still_fits(kinds):
                    self._program = self._get_program(kinds)
                self._is_checked = True
            except NotCompilableError as error:
                self._program, self.cache.not_compiled = None, str(error)
            self.cache.compile_s += now() - start
        return self._program if self.cache.not_compiled is None else None

    def _still_fits(self, kinds: tuple[str, ...]) -> bool:
        """Whether the program is one for such layers and, since the last prompt, for the model as it is."""
        if self._program is None or self._program.kinds != kinds:
            return False
        return self._is_checked or (not has_hooks(self._model) and self._program.fits(self._model))

    def _get_program(self, kinds: tuple[str, ...]) -> Program | None:
        """What runs a step; None: not yet.

        Raises:
            NotCompilableError: there is none.
        """
        check_compilable(self._model, recorded=self._records)
        if not self._records:
            return self._get_package(kinds)
        return None if self._mode == AUTO and self.eager_s < _RECORDING_S else GraphedStep(self._model, kinds)

    def _get_package(self, kinds: tuple[str, ...]) -> Package | None:
        """From memory, from disk, or built; None: not yet.

        Raises:
            NotCompilableError: there is none.
        """
        known = _loaded.setdefault(self._model, {})
        package = known.get(kinds)
        if package is not None and package.fits(self._model):
            return package
        if self._mode == AUTO:
            if kinds not in self._load_s:
                facts = build_times(self._model, kinds)
                self._load_s[kinds] = 0.0 if facts is None else facts.load_s  # none: told at once
            if self.eager_s < self._load_s[kinds]:  # at worst, loading then doubles the time
                return None
        known[kinds] = load_package(self._model, kinds, self._on_progress, build=self._mode == ALWAYS)
        return known[kinds]

    def _run(self, program: Program, token: Tensor, position: Tensor | None) -> CausalLMOutputWithPast:
        if position is None:
            position = torch.full_like(token, self.cache.get_seq_length())
        recorded_s = program.record_s
        logits, sliding = program(self._gathered(token, position, program.kinds))
        self.cache.compile_s += program.record_s - recorded_s
        store_new_token(self.cache, sliding)
        self.cache.num_compiled_steps += 1
        named: dict[str, Any] = {CACHE: self.cache}
        return CausalLMOutputWithPast(logits=logits[:, None], **named)

    def _gathered(self, token: Tensor, position: Tensor, kinds: tuple[str, ...]) -> StepInputs:
        """What a step reads.

        Raises:
            NotCompilableError: there is no memory for new room in all layers at once.
        """
        try:
            return gather_inputs(self.cache, token, position, kinds, self._places)
        except torch.OutOfMemoryError as error:
            raise NotCompilableError("there is no memory for all layers' new room at once") from error


def _dispatch(contexts: list[CompiledDecoding], eager: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's `forward` while contexts are open on it."""
    cache = given_cache(kwargs)
    own = None if args or cache is None else next((one for one in contexts if one.cache is cache), None)
    return eager(*args, **kwargs) if own is None else own.forward(eager, **kwargs)
