"""Checks that many options need, and what to say after an unknown name."""

import difflib
import os
from collections.abc import Iterable, Sequence

from compresskv.errors import ConfigError


def check_known(option: str, value: object, known: Iterable[str]) -> None:
    """Refuse a name that is none of `known`.

    Raises:
        ConfigError: with the nearest known one, or all of them.
    """
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise ConfigError(f"is unknown{suggestion(value, names)}", option=option, value=value)


def check_least(option: str, value: float | None, least: int = 1) -> None:
    """Refuse a number below `least`. None, which stands for a default, is none.

    Raises:
        ConfigError: naming the option and its value.
    """
    if value is not None and not value >= least:
        raise ConfigError(f"must be at least {least}", option=option, value=value)


def is_int(value: object) -> bool:
    """Whether it is a whole number; True and False count as none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(option: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        ConfigError: naming the parameter.
    """
    if not ((or_none and value is None) or (isinstance(value, int) and is_int(value) and value >= 1)):
        raise ConfigError(f"must be an int of at least 1{', or None' if or_none else ''}", option=option, value=value)


def check_path(option: str, value: object) -> None:
    """Refuse what names no file.

    Raises:
        ConfigError: it is neither text nor a path, or holds a NUL.
    """
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(os.fspath(value)):
        raise ConfigError("must be the name of a file", option=option, value=value)


def check_callbacks(**callbacks: object) -> None:
    """Refuse what cannot be called when something is to be told. None stands for nobody.

    Raises:
        ConfigError: naming the parameter.
    """
    for option, value in callbacks.items():
        if value is not None and not callable(value):
            raise ConfigError("must be a function, or None", option=option, value=value)


def check_flag(option: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what is neither True nor False: a text, for one, would count as True.

    Raises:
        ConfigError: naming the parameter.
    """
    if not (isinstance(value, bool) or (or_none and value is None)):
        raise ConfigError(f"must be True{', False or None' if or_none else ' or False'}", option=option, value=value)


def suggestion(word: object, known: Sequence[str]) -> str:
    """': did you mean ...?' where a known name comes near, and the whole list otherwise."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return f": did you mean {by_lower[near[0]]!r}?" if near else f": choose from {', '.join(known)}"
