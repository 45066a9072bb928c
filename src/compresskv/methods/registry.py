"""Methods by name: this package's, those registered in this process, and those of other packages' entry points."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import warnings
from functools import cache
from typing import Any, TypeVar

import compresskv.methods as own
from compresskv.errors import ConfigError, first_line, told
from compresskv.methods.base import Method, option_types
from compresskv.methods.options import parse_settings
from compresskv.system.check import check_known, suggestion

GROUP = "compresskv.methods"
"""The entry points of packages with methods: each names a `Method` class, or a module that registers some."""

_METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=type[Method])


def register(method: _M) -> _M:
    """Class decorator: make the method known by its `name`. It stands above `@dataclass(frozen=True)`.

    Raises:
        ConfigError: no class of methods with a name, a summary and a source, or one with options that is no dataclass.
        ValueError: the name is taken.
    """
    if not (isinstance(method, type) and issubclass(method, Method) and hasattr(method, "name")):
        raise ConfigError("must be a class derived from Method, with a name", option="method", value=method)
    missing = [name for name in ("summary", "source") if not hasattr(method, name)]
    if missing:
        raise ConfigError(f"has no {' and no '.join(missing)}", option="method", value=method.name)
    if _options_of(method) and "__dataclass_params__" not in vars(method):
        problem = "has options, so it must be a dataclass: @register above @dataclass(frozen=True)"
        raise ConfigError(problem, option="method", value=method.name)
    if method.name in _METHODS:
        raise ValueError(f"a method named {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def _options_of(method: type[Method]) -> list[str]:
    """What a class itself declares as options, as far as its annotations can be looked at."""
    try:
        declared = inspect.get_annotations(method)
    except NameError:  # what is imported for types alone, where annotations are no text
        return []
    return [name for name, kind in declared.items() if "ClassVar" not in str(kind)]


def methods() -> dict[str, type[Method]]:
    """Every registered method by name, sorted."""
    for module in pkgutil.iter_modules(own.__path__):
        importlib.import_module(f"{own.__name__}.{module.name}")
    _load_entry_points()
    return dict(sorted(_METHODS.items()))


@cache
def _load_entry_points() -> None:
    """Once a process. One that fails is told and left out: the other methods work without it."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            found = entry.load()
            if isinstance(found, type) and issubclass(found, Method) and found not in _METHODS.values():
                register(found)
        except Exception as error:  # noqa: BLE001 - whatever another package does
            problem = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"the method {entry.name!r} ({entry.value}) cannot be loaded: {problem}", stacklevel=2)


def create(name: str, /, **options: Any) -> Method:
    """Build a method from its name and options.

    Raises:
        ConfigError: an unknown name or option, with the nearest known one; an option out of range.
    """
    known = methods()
    check_known("method", name, known)  # compressing(model, 256): a budget in its place
    typed = list(option_types(known[name]))
    fields = [field.name for field in dataclasses.fields(known[name])]
    for option, value in options.items():
        if option not in (typed if isinstance(value, (int, float)) else fields):
            problem = f"is no option of method {name!r}{suggestion(option, typed)}"
            raise ConfigError(problem, option=option, value=value)
    return known[name](**options)


def parse_method(option: str, text: str) -> Method:
    """One method, by its name or label.

    Raises:
        ConfigError: as for `parse_methods`, or several.
    """
    found = list(parse_methods(option, text).values())
    if len(found) != 1:
        raise ConfigError(f"names {len(found)} methods: give one", option=option, value=text)
    return found[0]


def parse_methods(option: str, text: str) -> dict[str, Method]:
    """'snapkv,snapkv[window_size=32,kernel_size=15]' as methods by label; a label tells what differs from defaults.

    Args:
        option: the parameter they are given as, for error messages.
    Raises:
        ConfigError: an unknown method or option, or brackets that do not close.
    """
    found: dict[str, Method] = {}
    for spec in re.split(r",(?![^\[]*\])", text):
        match = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[([^\[\]]*)\])?\s*", spec)
        if match is None:
            raise ConfigError("is not NAME or NAME[option=value,...]", option=option, value=spec.strip())
        settings = [part.strip() for part in (match[2] or "").split(",") if part.strip()]
        try:
            method = create(match[1], **parse_settings("settings", settings))
        except ConfigError as error:
            if error.option in (None, option):
                raise
            if error.option == "method":
                raise ConfigError(error.problem, option=option, value=match[1]) from None
            problem = told(repr(error.value), error.problem) if error.option == "settings" else str(error)
            raise ConfigError(f": {problem}", option=option, value=spec.strip()) from None
        found[method.label] = method
    return found
