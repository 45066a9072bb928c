"""A command, as its help shows it."""

from typing import Any

import typer.core

from compresskv.cli.usage import named


class Command(typer.core.TyperCommand):
    """What a value is stands behind its option as one noun in capitals, and an argument is called by such a noun.

    Releases of typer differ in how they show arguments, and newer ones put Python's types behind them.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """'[OPTIONS] MODEL [PROFILE]'."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *map(_noun, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the lists of arguments and of options."""
        shown: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for one in self.get_params(ctx):
            record = one.get_help_record(ctx)
            if record is not None:
                is_option = one.param_type_name == "option"
                shown[one.param_type_name].append(record if is_option else (_noun(one), record[1]))
        for kind, lines in shown.items():
            if lines:
                with formatter.section(f"{kind.capitalize()}s"):
                    formatter.write_dl(lines)


def _noun(argument: Any) -> str:
    """'RUN...' where there may be several, '[PROFILE]' where there may be none."""
    noun = named(argument) + ("..." if argument.nargs != 1 else "")
    return noun if argument.required else f"[{noun}]"
