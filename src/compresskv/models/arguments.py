"""By which name a model takes its cache: transformers calls it `cache` since 5.24, and `past_key_values` before."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

_OLD, _NEW = "past_key_values", "cache"
_RENAMED_IN = (5, 24)
CACHE_NAMES = (_NEW, _OLD)
CACHE = _NEW if tuple(map(int, transformers.__version__.split(".")[:2])) >= _RENAMED_IN else _OLD
"""What transformers' own models and outputs call it."""


def cache_argument(model: nn.Module) -> str:
    """The name of a model's argument; models from elsewhere may have kept the old one."""
    return _cache_argument(type(model))  # type: ignore[arg-type]


@functools.cache
def _cache_argument(kind: type[nn.Module]) -> str:
    names = inspect.signature(kind.forward).parameters
    return _OLD if _OLD in names and _NEW not in names else CACHE


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments; None where there is none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def with_cache(given: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments with another cache in its place."""
    name = next((name for name in CACHE_NAMES if given.get(name) is not None), CACHE)
    return {**given, name: cache}
