"""Counts, on a CPU, what would make Python wait for a GPU."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero", "equal")
} | {torch.nonzero, torch.equal}
_UPLOADS = {torch.tensor, torch.as_tensor}
_NUMBER = torch.ops.aten._local_scalar_dense.default


class Waits(TorchFunctionMode):
    """While it is open, `seen` notes every reading of a tensor's numbers, and every list that is made a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._numbers = _Numbers()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _READS or (function in _UPLOADS and isinstance(args[0], list)):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Waits":
        super().__enter__()
        self._numbers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._numbers.__exit__(kind, error, traceback)
        super().__exit__(kind, error, traceback)
        self.seen += ["number"] * max(0, self._numbers.count - len(self.seen))


class _Numbers(TorchDispatchMode):
    """Counts what C++ code reads by itself, too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is _NUMBER
        return function(*args, **(kwargs or {}))
