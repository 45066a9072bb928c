"""PyTorch, imported when it is first used: to name methods or to read a profile nobody waits for it.

    from compresskv.system.later import torch

For modules that are imported where nothing is computed. They use it inside functions only, and take `Tensor` for
annotations from `torch` under TYPE_CHECKING.
"""

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _Torch()

__all__ = ["no_grad", "torch"]

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` as a decorator that does not import torch before the function is called."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
