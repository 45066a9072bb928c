"""Decode steps on a CUDA device: recorded as a CUDA graph, and replayed without Python or PyTorch in between."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.routing import routing
from compresskv.compiled.package import NotCompilableError, state_of
from compresskv.compiled.step import SLIDING, Step, StepInputs
from compresskv.errors import first_line

Run = Callable[[], Tensor]
Replay = Callable[[], object]
Record = Callable[[Run, torch.device], tuple[Replay, Tensor]]


def record_cuda_graph(run: Run, device: torch.device) -> tuple[Replay, Tensor]:
    """Record what `run` does on a CUDA device.

    Returns: what does it again, on that device's current stream, and the tensor that it writes its result to.
    """
    with torch.cuda.device(device):
        before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(before)
        try:
            with torch.cuda.stream(side):
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


@dataclass(frozen=True)
class _Recording:
    numbers: tuple[Tensor, ...]
    """What it reads beside weights, keys and values: token, position, starts and ends of the step."""
    places: list[tuple[object, ...]]
    """Where keys and values lie; they are the cache's own, and not kept alive by this."""
    replay: Replay
    logits: Tensor
    """What it writes."""


class GraphedStep:
    """A `Step` of one model and one cache.

    A recording reads and writes tensors where they lay, so it holds until the cache's layers need new room, and is
    then made again. Running a step twice writes the same numbers to the same places: recording does no harm.

    Never run on a GPU so far; tests hold all but `record_cuda_graph` equal to PyTorch's own steps on CPUs.
    """

    def __init__(self, model: PreTrainedModel, kinds: tuple[str, ...], record: Record = record_cuda_graph) -> None:
        """Nothing is recorded yet.

        Raises:
            NotCompilableError: a layer has a sliding window, or accelerate has placed the model.
        """
        if SLIDING in kinds:
            raise NotCompilableError("layers with a sliding window hold other tensors after each token")
        self._state = state_of(model)
        self._kept = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]  # read by address
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise NotCompilableError("accelerate moves what its modules are given")
        self.kinds = kinds
        self.record_s = 0.0
        """Seconds that recordings took."""
        self._model = model
        self._step = Step(model, kinds)
        self._record = record
        self._recording: _Recording | None = None

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
        """As `Step.forward`.

        Raises:
            NotCompilableError: the model does what cannot be recorded.
        """
        if self._recording is None or self._recording.places != _places(inputs):
            self._recording = None  # frees its memory before the next one takes its own
            start = time.perf_counter()
            self._recording = self._make_recording(inputs)
            self.record_s += time.perf_counter() - start
        own = self._recording
        for held, given in zip(own.numbers, _numbers(inputs), strict=True):
            held.copy_(given)
        own.replay()
        return own.logits.clone(), []  # the next replay writes there again

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model's tensors lie where they lay, and its modules are set as they were."""
        return state_of(model) == self._state

    @torch.no_grad()
    def _make_recording(self, inputs: StepInputs) -> _Recording:
        with torch.inference_mode(False):  # they are written to in later steps, whatever mode those are in
            token, position, starts, ends = numbers = tuple(tensor.clone() for tensor in _numbers(inputs))
        arguments = StepInputs(token, position, starts, ends, inputs.keys, inputs.values, inputs.packed).as_args()
        try:
            with routing(self._model):
                replay, logits = self._record(lambda: self._step(*arguments)[0], self._model.device)
        except Exception as error:  # whatever a model's code or CUDA raises
            raise NotCompilableError(f"its decode step cannot be recorded ({first_line(error)})") from error
        return _Recording(numbers, _places(inputs), replay, logits)


def _numbers(inputs: StepInputs) -> tuple[Tensor, ...]:
    """What changes from step to step."""
    return inputs.token, inputs.position, inputs.starts, inputs.ends


def _places(inputs: StepInputs) -> list[tuple[object, ...]]:
    """Where keys and values lie, and how."""
    held = [*inputs.keys, *inputs.values, *(tensor for own in inputs.packed for tensor in own)]
    return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in held]
