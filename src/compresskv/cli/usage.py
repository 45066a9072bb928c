"""What the parser of options refuses, in one line that looks like every other refusal."""

import difflib
import sys
from typing import Any

import typer

from compresskv.errors import told

UsageError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""Of typer's own parser or of click, which earlier releases take."""


def is_help(error: Any) -> bool:
    """Whether the error is no error: a command without arguments, whose text is its help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def explained(error: Any) -> str:
    """One line: what was typed, what is wrong with it, and what to type instead."""
    command = error.ctx.command_path if error.ctx is not None else "compresskv"
    kind = type(error).__name__
    if kind == "NoSuchOption":
        known = [option for one in error.ctx.command.params for option in one.opts] if error.ctx is not None else []
        near = difflib.get_close_matches(error.option_name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {command} --help"
        return f"{error.option_name} is no option of '{command}': {hint}"
    if kind == "MissingParameter" and error.param is not None:
        return f"{named(error.param)} is missing: {_usage(error)}"
    if error.message.startswith("Got unexpected extra"):
        extra = error.message.rpartition(" (")[2].rstrip(".)")
        return f"{extra!r} is too much, or belongs in quotes with what is before it: {_usage(error)}"
    message = error.message.strip().rstrip(".")
    if kind == "BadOptionUsage":
        return f"{error.option_name} {'needs a' if 'requires' in message else 'takes no'} value"
    if getattr(error, "param", None) is not None:
        whole = "valid int" in message  # "valid integer" from typer 0.29 on
        problem = "is no whole number" if whole else f": {message}"
        return told(f"{named(error.param)} {_typed_value(error.param)}".rstrip(), problem)
    return f"{command}: {message[:1].lower()}{message[1:]}"


def named(parameter: Any) -> str:
    """An option as it is typed, an argument as the usage line shows it: by the noun for one of them."""
    is_option = parameter.param_type_name == "option"
    return str(max(parameter.opts, key=len) if is_option else parameter.metavar or parameter.name.upper())


def _typed_value(parameter: Any) -> str:
    """What was typed behind an option: not every release of the parser says it."""
    for place, argument in enumerate(sys.argv):
        option, equals, value = argument.partition("=")
        if option in parameter.opts:
            return repr(value if equals else "".join(sys.argv[place + 1 : place + 2]))
    return ""


def _usage(error: Any) -> str:
    """The command with its arguments and the options that it cannot do without."""
    if error.ctx is None:
        return "compresskv --help"
    words = [error.ctx.command_path]
    for one in error.ctx.command.params:
        if one.required:
            words.append(f"{named(one)} ..." if one.param_type_name == "option" else named(one))
    return " ".join([*words, "[OPTIONS]"])
