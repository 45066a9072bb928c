"""Tells before a step is recorded what would make Python wait for the device, which no recording can hold."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_READS = {_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.masked_select.default}
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}
_COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default}


class NoWaits(TorchDispatchMode):
    """While it is open, whoever reads a tensor's numbers on a device gets a RuntimeError.

    A recording that CUDA refuses in the middle leaves PyTorch's allocator in disorder, and its error does not say what
    was done.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._waits(function, args, kwargs or {}):
            raise RuntimeError(f"it waits for what {function} gives")
        return function(*args, **(kwargs or {}))

    def _waits(self, function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if function in _READS:
            return bool(args[0].device.type == self._type)
        if function in _INDEXING:  # a mask of bools is looked through for its ones
            return any(isinstance(own, Tensor) and own.dtype == torch.bool for own in args[1])
        if function in _COPIES:
            source = args[1] if function is _ATEN.copy_.default else args[0]
            target = args[0].device if function is _ATEN.copy_.default else kwargs.get("device") or source.device
            return bool(torch.device(target).type != source.device.type)
        return False
