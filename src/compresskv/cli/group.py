"""Groups of commands whose errors name options as they are typed."""

from collections.abc import Mapping
from typing import Any, get_type_hints

import typer.core

from compresskv.cli.typed import as_typed, parameters_of, typed_name
from compresskv.cli.usage import named
from compresskv.errors import CompressKVError, ConfigError, shown, told
from compresskv.system.check import suggestion


class CommandGroup(typer.core.TyperGroup):
    """Where the Python API says max_new_tokens=0, its commands say --max-new-tokens 0."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is meant.

        Raises:
            ConfigError: there is none of that name, or an empty text stands where it takes a path.
        """
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise ConfigError(f"{args[0]!r} is no command of '{ctx.command_path}'{suggestion(args[0], self._shown())}")
        name, command, rest = super().resolve_command(ctx, args)
        _refuse_empty_paths(command, rest)
        return name, command, rest

    def _shown(self) -> list[str]:
        return [name for name, command in self.commands.items() if not command.hidden]

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            CompressKVError: as the command raised it, or in its place one with the option's name.
        """
        try:
            return super().invoke(ctx)
        except CompressKVError as error:
            command = self.commands.get(str(ctx.invoked_subcommand))
            if command is None or hasattr(command, "commands"):  # a group below has said it already
                raise
            message = _as_typed(error, parameters_of(command))
            if message == str(error):
                raise
            raise type(error)(message) from error


def _refuse_empty_paths(command: Any, args: list[str]) -> None:
    """An empty path, such as a variable of the shell that was never set, would be the current folder.

    Raises:
        ConfigError: naming the option or the argument.
    """
    if not any(not arg or arg.endswith("=") for arg in args):
        return
    hints = get_type_hints(getattr(command.callback, "__wrapped__", None) or (lambda: None))
    options = [one for one in command.params if one.param_type_name == "option" and not one.is_flag]
    taking = {option: one for one in options for option in one.opts}
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    for before, arg in zip(["", *args], args, strict=False):
        option, equals, value = arg.partition("=")
        meant = [taking[option]] if equals and not value and option in taking else []
        if not arg:
            meant = [taking[before]] if before in taking else arguments
        for one in meant:
            if "Path" in str(hints.get(one.name)):
                raise ConfigError(f"{named(one)} '' names nothing: give a path")


def _as_typed(error: CompressKVError, parameters: Mapping[str, Any]) -> str:
    """The error in the command's own words; in Python's where the command has no such parameter."""
    problem = as_typed(error.problem, parameters)
    if error.option is None:
        return problem
    name = typed_name(parameters, error.option) or error.option
    if name == error.option and name not in parameters:
        return str(error)
    return told(name if error.value is None else f"{name} {_shown(error.value)}", problem)


def _shown(value: object) -> str:
    """As it was typed, with quotes around what is text."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "''"
    return shown(value)
