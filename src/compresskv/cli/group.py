"""Groups of commands whose errors name options as they are typed."""

from typing import Any

import typer.core

from compresskv.errors import CompressKVError


class Group(typer.core.TyperGroup):
    """Where the Python API says max_new_tokens=0, its commands say --max-new-tokens 0."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            CompressKVError: as the command raised it, or in its place one with the option's name.
        """
        try:
            return super().invoke(ctx)
        except CompressKVError as error:
            command = self.commands.get(str(ctx.invoked_subcommand))
            if error.option is None or command is None:
                raise
            raise type(error)(_as_typed(error, command)) from error


def _as_typed(error: CompressKVError, command: Any) -> str:
    """The error in the command's own words; in Python's where the command has no such parameter."""
    parameters = {parameter.name: parameter for parameter in command.params}
    for name in (error.option, f"{error.option}s"):  # --budgets takes several of what is one `budget` each
        if name in parameters:
            is_option = parameters[name].param_type_name == "option"
            shown = max(parameters[name].opts, key=len) if is_option else error.option
            return f"{shown} {error.value!r} {error.problem}"
    return str(error)
