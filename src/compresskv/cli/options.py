"""Options that several commands take, and how their text becomes values."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from compresskv.errors import ConfigError

N = TypeVar("N", int, float)

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Hub id, folder, .gguf file, or the embedded smollm2-135m.", metavar="MODEL"),
]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's own.", metavar="DTYPE")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="Profile file. Default: the model's own.", metavar="FILE")
]


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["window_size=32"]` as method options; numbers become numbers.

    Raises:
        ConfigError: no NAME=VALUE, or a value that is no number.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals and text):
            raise ConfigError(f"--set {setting!r} is not NAME=VALUE, such as window_size=32")
        if name == "profile":
            raise ConfigError(f"--set {setting!r}: a profile is given with --profile FILE")
        options[name.replace("-", "_")] = _number(text)
    return options


def parse_numbers(option: str, text: str | None, kind: Callable[[str], N]) -> tuple[N, ...] | None:
    """'1024,4096' as numbers; None stays None.

    Raises:
        ConfigError: one of them is no such number.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of numbers separated by commas") from None


def _number(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"{text!r} is not a number")
