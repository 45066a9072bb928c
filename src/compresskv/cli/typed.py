"""Options of a command as they are typed: which were, and how messages name them that say max_new_tokens=0."""

import importlib
import re
from collections.abc import Mapping
from typing import Any

from compresskv.cli.usage import UsageError

_PARSER = UsageError.__module__.rpartition(".")[0]
"""The package of typer's own parser, or click, which earlier releases take."""
_SETTING = re.compile(r"(?<!['/.-])\b([a-z_]+)=('[^']*'|[^\s,:;()]+)")


def is_typed(option: str) -> bool:
    """Whether the command that runs was given that parameter, by its name in Python."""
    context = _context()
    source = None if context is None else context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def parameters_of(command: Any) -> dict[str, Any]:
    """A command's parameters by their names in Python."""
    return {parameter.name: parameter for parameter in command.params}


def as_typed(text: str, parameters: Mapping[str, Any] | None = None) -> str:
    """A message with --max-new-tokens 0 for max_new_tokens=0; in Python's words where the command has no such option.

    Args:
        parameters: of the command; None: of the one that runs.
    """
    if parameters is None:
        context = _context()
        parameters = {} if context is None else parameters_of(context.command)

    def retyped(match: re.Match[str]) -> str:
        name = typed_name(parameters, match[1])
        return match[0] if name is None else f"{name} {match[2]}"

    return _SETTING.sub(retyped, text)


def typed_name(parameters: Mapping[str, Any], name: str) -> str | None:
    """A parameter of Python as the command's user types it; None where the command has none."""
    for parameter in (parameters.get(name), parameters.get(f"{name}s")):  # --budgets takes several of what is one each
        if parameter is not None:
            return max(parameter.opts, key=len) if parameter.param_type_name == "option" else name
    return None


def _context() -> Any:
    return importlib.import_module(f"{_PARSER}.globals").get_current_context(silent=True)
