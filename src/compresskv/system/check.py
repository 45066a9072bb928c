"""Checks that many options need."""

from collections.abc import Iterable

from compresskv.errors import ConfigError
from compresskv.system.suggest import suggestion


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
