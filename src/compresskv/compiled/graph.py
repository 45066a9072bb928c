"""Decode steps on a CUDA device: recorded as a CUDA graph, and replayed without Python or PyTorch in between."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention import routing
from compresskv.compiled.package import NotCompilableError
from compresskv.compiled.step import SLIDING, Step, StepInputs
from compresskv.errors import first_line

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def record_cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record what `run` does on the current CUDA device.

    Returns: what does it again, and the tensor that it writes its result to.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # libraries take their working memory at the first call, which must not be recorded
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


@dataclass(frozen=True)
class _Recording:
    inputs: StepInputs
    """What it reads; keys and values are the cache's own."""
    replay: Callable[[], object]
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
            NotCompilableError: a layer has a sliding window.
        """
        if SLIDING in kinds:
            raise NotCompilableError("layers with a sliding window hold other tensors after each token")
        self.kinds = kinds
        self._model = model
        self._step = Step(model, kinds)
        self._record = record
        self._weights = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]  # read by address
        self._recording: _Recording | None = None

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, list[Tensor]]:
        """As `Step.forward`.

        Raises:
            NotCompilableError: the model does what cannot be recorded.
        """
        if self._recording is None or not _same_tensors(self._recording.inputs, inputs):
            self._recording = None  # frees its memory before the next one takes its own
            self._recording = self._make_recording(inputs)
        own = self._recording
        for held, given in zip(_numbers(own.inputs), _numbers(inputs), strict=True):
            held.copy_(given)
        own.replay()
        return own.logits.clone(), []  # the next replay writes there again

    @torch.no_grad()
    def _make_recording(self, inputs: StepInputs) -> _Recording:
        with torch.inference_mode(False):  # they are written to in later steps, whatever mode those are in
            token, position, starts, ends = (tensor.clone() for tensor in _numbers(inputs))
        own = StepInputs(token, position, starts, ends, inputs.keys, inputs.values)
        try:
            with routing(self._model):
                return _Recording(own, *self._record(lambda: self._step(*own.as_args())[0]))
        except RuntimeError as error:
            raise NotCompilableError(f"its decode step cannot be recorded ({first_line(error)})") from error


def _numbers(inputs: StepInputs) -> tuple[Tensor, ...]:
    """What changes from step to step."""
    return inputs.token, inputs.position, inputs.starts, inputs.ends


def _same_tensors(held: StepInputs, given: StepInputs) -> bool:
    """Whether keys and values lie where they lay."""
    pairs = zip(held.keys + held.values, given.keys + given.values, strict=True)
    return all(one.data_ptr() == other.data_ptr() and one.shape == other.shape for one, other in pairs)
