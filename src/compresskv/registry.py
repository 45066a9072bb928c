"""Methods by name."""

import dataclasses
from typing import Any, TypeVar

from compresskv.errors import ConfigError
from compresskv.method import Method
from compresskv.suggest import suggestion

_METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=type[Method])


def register(method: _M) -> _M:
    """Class decorator: make the method known by its `name`.

    Raises:
        ValueError: the name is taken.
    """
    if method.name in _METHODS:
        raise ValueError(f"a method named {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """Every registered method by name, sorted."""
    import compresskv.methods  # noqa: F401 - registers them

    return dict(sorted(_METHODS.items()))


def create(name: str, /, **options: Any) -> Method:
    """Build a method from its name and options.

    Raises:
        ConfigError: an unknown name or option, with the nearest known one; an option out of range.
    """
    known = methods()
    if not isinstance(name, str) or name not in known:  # compressing(model, 256): a budget in its place
        raise ConfigError(f"unknown method {name!r}{suggestion(name, list(known))}")
    fields = [field.name for field in dataclasses.fields(known[name])]
    for option in options:
        if option not in fields:
            raise ConfigError(f"method {name!r} has no option {option!r}{suggestion(option, fields)}")
    return known[name](**options)
