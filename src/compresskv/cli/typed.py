"""Which options of a command were typed, be it with the value that they have anyway."""

import importlib

from compresskv.cli.usage import UsageError

_PARSER = UsageError.__module__.rpartition(".")[0]
"""The package of typer's own parser, or click, which earlier releases take."""


def is_typed(option: str) -> bool:
    """Whether the command that runs was given that parameter, by its name in Python."""
    context = importlib.import_module(f"{_PARSER}.globals").get_current_context(silent=True)
    source = None if context is None else context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"
