"""Method options as people type them."""

from collections.abc import Sequence
from typing import Any

from compresskv.errors import ConfigError


def parse_settings(option: str, settings: Sequence[str]) -> dict[str, Any]:
    """`["window_size=32"]` as method options; numbers become numbers, true and false too.

    Args:
        option: the parameter they are given as, for error messages.
    Raises:
        ConfigError: no NAME=VALUE, a name that is given twice, or a value that is no number and not true or false.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        name, _, text = (part.strip() for part in setting.partition("="))
        if not (name and text):
            raise ConfigError("is not NAME=VALUE, such as window_size=32", option=option, value=setting)
        if (name := name.replace("-", "_")) in options:
            raise ConfigError(f"gives {name} twice", option=option, value=setting)
        options[name] = _value(option, setting, text)
    return options


def _value(option: str, setting: str, text: str) -> int | float | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f": {text!r} is not a number, true or false", option=option, value=setting)
