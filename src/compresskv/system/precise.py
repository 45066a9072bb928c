"""Arithmetic that a caller's `torch.autocast` leaves alone."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_DEVICE_TYPES = ("cpu", "cuda")


def precisely(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute in its tensors' own dtypes, also inside of `torch.autocast`.

    What is packed would lose its bits to it, and its CPU mode has no rule for float16.
    """

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(torch.is_autocast_enabled, _DEVICE_TYPES)):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return precise
