"""Options that several commands take, and how their text becomes values."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

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
