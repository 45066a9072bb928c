"""Decode steps on a CUDA device: recorded as a CUDA graph, and replayed without Python or PyTorch in between."""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.routing import routing
from compresskv.compiled.compilable import NotCompilableError
from compresskv.compiled.package import state_of
from compresskv.compiled.step import SLIDING, Step, StepInputs
from compresskv.compiled.waits import NoWaits
from compresskv.errors import first_line
from compresskv.system.clock import now

Run = Callable[[], list[Tensor]]
Replay = Callable[[], object]
Record = Callable[[Run, torch.device], tuple[Replay, list[Tensor]]]

_failed: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], str]] = weakref.WeakKeyDictionary()
"""Why steps of some kinds of layers could not be recorded: no later prompt tries again."""

_LEAST_REPLAYS, _MOST_MOVES = 8, 3
"""A recording that is not replayed more often is not worth it; so many in a row, and no more are made."""


def record_cuda_graph(run: Run, device: torch.device) -> tuple[Replay, list[Tensor]]:
    """Record what `run` does on a CUDA device.

    Returns: what does it again, on that device's current stream, and the tensors that it writes its results to.
    """
    with torch.cuda.device(device):
        before, graph, side = torch.cuda.current_stream(), torch.cuda.CUDAGraph(), _side_stream(device)
        side.wait_stream(before)
        try:
            with torch.cuda.stream(side), NoWaits(device):
                run()  # libraries take their working memory at the first call, which must not be recorded
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                result = run()
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own
            before.wait_stream(side)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep working memory for each stream that they were called on."""
    return torch.cuda.Stream(device)


@dataclass
class _Recording:
    numbers: tuple[Tensor, ...]
    """What it reads beside weights, keys and values: token, position, starts and ends of the step."""
    windows: list[Tensor]
    """Of layers with sliding windows, keys and values that it reads: all that the new token sees beside itself."""
    places: list[tuple[object, ...]]
    """Where keys and values lie; they are the cache's own, and not kept alive by this."""
    replay: Replay
    logits: Tensor
    """What it writes."""
    moved: Tensor | None
    """The windows that the token after it will see, end to end in one tensor, which it writes, too."""
    num_replays: int = 0


class GraphedStep:
    """A `Step` of one model and one cache.

    A recording reads and writes tensors where they lay, so it holds until the cache's layers need new room, and is
    then made again. Running a step twice writes the same numbers to the same places: recording does no harm. Windows
    that slide lie elsewhere after each token: they are copied to where the recording reads them, and from where it
    writes them, all at once.

    Tests hold all but `record_cuda_graph` equal to PyTorch's own steps on CPUs.
    """

    def __init__(self, model: PreTrainedModel, kinds: tuple[str, ...], record: Record = record_cuda_graph) -> None:
        """Nothing is recorded yet.

        Raises:
            NotCompilableError: accelerate has placed the model, or recording such a step failed before.
        """
        self._state = state_of(model)
        self._kept = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]  # read by address
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise NotCompilableError("accelerate moves what its modules are given")
        self._failures, self._sort = _failed.setdefault(model, {}), (kinds, model.config._attn_implementation)
        if (reason := self._failures.get(self._sort)) is not None:
            raise NotCompilableError(reason)
        self.kinds = kinds
        self.record_s = 0.0
        """Seconds that recordings took."""
        self._model = model
        self._step = Step(model, kinds)
        self._record = record
        self._recording: _Recording | None = None
        self._num_moves = 0

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
        """As `Step.forward`; of sliding layers, whose windows must be full, without the oldest token.

        Raises:
            NotCompilableError: the model does what cannot be recorded, or the cache lies elsewhere all the time.
        """
        places = self._places(inputs)
        if self._recording is None or self._recording.places != places:
            self._count_move()
            self._recording = None  # frees its memory before the next one takes its own
            start = now()
            self._recording = self._make_recording(inputs, places)
            self.record_s += now() - start
        own = self._recording
        own.num_replays += 1
        for held, given in zip(own.numbers, _numbers(inputs), strict=True):
            held.copy_(given)
        if own.windows:
            torch._foreach_copy_(own.windows, self._windows(inputs))
        own.replay()
        return own.logits.clone(), _separate(own)  # the next replay writes there again

    def _count_move(self) -> None:
        """Beam search, say, gives the cache new tensors at every token."""
        if self._recording is not None:
            self._num_moves = self._num_moves + 1 if self._recording.num_replays < _LEAST_REPLAYS else 0
        if self._num_moves >= _MOST_MOVES:
            raise NotCompilableError("its cache lies elsewhere from token to token")

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model's tensors lie where they lay, and its modules are set as they were."""
        return state_of(model) == self._state

    @torch.no_grad()
    def _make_recording(self, inputs: StepInputs, places: list[tuple[object, ...]]) -> _Recording:
        with torch.inference_mode(False):  # they are written to in later steps, whatever mode those are in
            token, position, starts, ends = numbers = tuple(tensor.clone() for tensor in _numbers(inputs))
            windows = [window.clone() for window in self._windows(inputs)]
        keys, values = (
            self._with_windows(held, windows[at::2]) for at, held in enumerate((inputs.keys, inputs.values))
        )
        arguments = StepInputs(token, position, starts, ends, keys, values, inputs.packed).as_args()

        def run() -> list[Tensor]:
            logits, moved = self._step(*arguments)
            return [logits, torch.cat([states[:, :, 1:].flatten() for states in moved])] if moved else [logits]

        try:
            with routing(self._model):
                replay, (logits, *moved) = self._record(run, self._model.device)
        except Exception as error:  # whatever a model's code or CUDA raises
            reason = f"its decode step cannot be recorded ({first_line(_root(error))})"
            if not isinstance(error, torch.OutOfMemoryError):
                self._failures[self._sort] = reason
            raise NotCompilableError(reason) from error
        return _Recording(numbers, windows, places, replay, logits, moved[0] if moved else None)

    def _windows(self, inputs: StepInputs) -> list[Tensor]:
        """Keys and values of layers with sliding windows, in turns."""
        held = zip(self.kinds, inputs.keys, inputs.values, strict=True)
        return [states for kind, *own in held if kind == SLIDING for states in own]

    def _with_windows(self, held: list[Tensor], windows: list[Tensor]) -> list[Tensor]:
        """Those of all layers, with these in place of sliding windows."""
        own = iter(windows)
        return [next(own) if kind == SLIDING else states for kind, states in zip(self.kinds, held, strict=True)]

    def _places(self, inputs: StepInputs) -> list[tuple[object, ...]]:
        """Where keys and values lie, and how; windows are copied, and only their shapes count."""
        layers = zip(self.kinds, inputs.keys, inputs.values, inputs.packed, strict=True)
        places: list[tuple[object, ...]] = [tuple(inputs.token.shape)]
        for kind, keys, values, packed in layers:
            for tensor in (keys, values, *packed):
                lies = () if kind == SLIDING else (tensor.data_ptr(), tensor.stride())
                places.append((*lies, tensor.shape, tensor.dtype))
        return places


def _root(error: BaseException) -> BaseException:
    """What was raised first: leaving a recording that failed raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _separate(own: _Recording) -> list[Tensor]:
    """The windows that the token after it will see."""
    if own.moved is None:
        return []
    parts = own.moved.clone().split([window.numel() for window in own.windows])
    return [part.view(window.shape) for part, window in zip(parts, own.windows, strict=True)]


def _numbers(inputs: StepInputs) -> tuple[Tensor, ...]:
    """What changes from step to step."""
    return inputs.token, inputs.position, inputs.starts, inputs.ends
