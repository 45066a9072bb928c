"""Arithmetic that a caller's `torch.autocast` leaves alone."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

from compresskv.system.later import torch

P = ParamSpec("P")
R = TypeVar("R")
_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


def precisely(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute in its tensors' own dtypes, also inside of `torch.autocast`.

    What is packed would lose its bits to it, and its CPU mode has no rule for float16.
    """

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(torch.is_autocast_enabled, _DEVICE_TYPES)):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, _DEVICE_TYPES):
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return precise
