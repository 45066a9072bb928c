"""`compresskv session`: what a session's file holds."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from compresskv.cli.command import Command
from compresskv.cli.group import CommandGroup
from compresskv.cli.options import JsonOption
from compresskv.cli.terminal import megabytes, new_table, out
from compresskv.sessions.facts import Facts
from compresskv.sessions.header import read_facts

SHOW_EPILOG = """\b
Examples:
  compresskv session show report.kvc
  compresskv session show report.kvc --json
"""

session_app = typer.Typer(
    cls=CommandGroup,
    help="Show what a file of `compresskv read` holds.",
    epilog=SHOW_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@session_app.callback()
def _group() -> None:
    pass


@session_app.command(cls=Command, epilog=SHOW_EPILOG)
def show(
    session: Annotated[Path, typer.Argument(help="A file of 'compresskv read'.")],
    as_json: JsonOption = False,
) -> None:
    """Print a session's model, tokens, bytes, method and age. Neither the model nor what is kept is loaded."""
    facts, nbytes = read_facts(session), session.stat().st_size
    if as_json:
        out.print_json(json.dumps({**facts.to_dict(), "file_nbytes": nbytes}))
        return
    table = new_table("", "")
    table.show_header = False
    for name, value in _lines(facts, nbytes):
        table.add_row(name, value)
    out.print(table, soft_wrap=False)


def _lines(facts: Facts, nbytes: int) -> list[tuple[str, str]]:
    share = facts.mean_retained / facts.num_tokens
    budget = "" if facts.budget is None else f", budget {facts.budget}"
    profile = f", profile {facts.profile}" if facts.profile else ""
    return [
        ("document", ", ".join(facts.names) or "-"),
        ("model", f"{facts.model or '-'} ({facts.fingerprint}), {facts.dtype}"),
        ("tokens", f"{facts.num_tokens:,}"),
        ("kept", f"{facts.mean_retained:,.0f} per layer and KV head ({share:.1%})"),
        ("bytes", f"{megabytes(nbytes)} MB; the full cache has {megabytes(facts.kv_nbytes_full)} MB"),
        ("method", f"{facts.method}{budget}, store {facts.store}{profile}"),
        ("read", f"{age(facts.created)}, in {facts.read_s:.1f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    ]


def age(created: str) -> str:
    """'3 days ago', with the time itself."""
    try:
        then = datetime.fromisoformat(created)
        seconds = (datetime.now(timezone.utc) - then).total_seconds()
    except (ValueError, TypeError):
        return created
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {name}{'' if number == 1 else 's'} ago ({created})"
    return f"just now ({created})"
