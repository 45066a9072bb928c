"""Two devices for a machine that has none: tensors that note where they lie, and refuse to be computed with others.

As on Apple's GPUs, there is no float64 on them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}
"""They take indices from the CPU, too."""
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class _Placed(Tensor):
    """A tensor that lies on one of the two."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "_Placed":
        placed: _Placed = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device
        )
        placed.inner = inner
        return placed

    __torch_function__ = torch._C._disabled_torch_function_impl

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]
        return place(torch.tensor(data, dtype=self.dtype), self.device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class StandInDevices(TorchDispatchMode):
    """While it is open, what is made on one of the two devices lies there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on one of the two."""
    return _Placed(tensor, device)


def inner(tensor: Tensor) -> Tensor:
    """What lies there."""
    return tensor.inner if isinstance(tensor, _Placed) else tensor


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    tensors: list[Tensor] = []
    tree_map(lambda one: tensors.append(one) if isinstance(one, Tensor) else None, (args, kwargs))
    devices = {one.device for one in tensors if one.ndim}  # numbers go everywhere
    if function in _INDEXING:
        devices.discard(torch.device("cpu"))
    if len(devices) > 1 and function not in _COPIES:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found {devices}")
    target = kwargs.get("device") or (tensors[0].device if tensors else None)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda one: inner(one) if isinstance(one, Tensor) else one, (args, kwargs))
    result = function(*args, **kwargs)
    if target not in (FIRST, SECOND):
        return result
    return tree_map(lambda one: _placed(function, one, target) if isinstance(one, Tensor) else one, result)


def _placed(function: Any, result: Tensor, device: torch.device) -> Tensor:
    if result.dtype == torch.float64:
        raise TypeError(f"{function}: the device has no float64")
    return place(result, device)
