"""`compresskv session`: what a session's file holds."""

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from compresskv.cli.command import Command
from compresskv.cli.group import CommandGroup
from compresskv.cli.options import JsonOption
from compresskv.cli.terminal import beginning, megabytes, new_table, out
from compresskv.selection.budget_words import in_words
from compresskv.sessions.facts import Facts
from compresskv.sessions.header import facts_of, read_metadata, turns_of
from compresskv.sessions.turn import Turn

SHOW_EPILOG = """\b
Examples:
  compresskv session show report.kvc
  compresskv session show report.kvc --json
"""

session_app = typer.Typer(
    cls=CommandGroup,
    help="Show what a file of `compresskv read` or `chat` holds.",
    epilog=SHOW_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@session_app.callback()
def _group() -> None:
    pass


@session_app.command(cls=Command, epilog=SHOW_EPILOG, short_help="Print what a session holds, and what was said.")
def show(
    session: Annotated[Path, typer.Argument(help="A file of 'compresskv read' or 'chat'.")],
    as_json: JsonOption = False,
) -> None:
    """Print a session's model, tokens, bytes, method and age, and what was said in its conversation.

    Neither the model nor what is kept is loaded. With --json, questions and answers are printed whole.
    """
    metadata = read_metadata(session)
    facts, turns, nbytes = facts_of(session, metadata), turns_of(session, metadata), session.stat().st_size
    if as_json:
        said = [turn.to_dict() for turn in turns]
        out.print_json(json.dumps({**facts.to_dict(), "turns": said, "file_nbytes": nbytes}))
        return
    table = new_table("", "")
    table.show_header = False
    for name, value in _lines(facts, nbytes):
        table.add_row(name, value)
    out.print(table, soft_wrap=False)
    if turns:
        out.print(_conversation(turns), soft_wrap=False)


def _conversation(turns: Sequence[Turn]) -> Table:
    """The turns that are held: how each begins."""
    numbers = ("turn", "tokens")
    table = new_table(*numbers, "question", "answer", numbers=numbers, title="conversation")
    for turn in turns:
        tokens = "?" if turn.num_tokens is None else f"{turn.num_tokens:,}"
        table.add_row(str(turn.number), tokens, *(_shown(one) for one in (turn.question, turn.answer)))
    if turns[0].number > 1:
        table.caption, table.caption_justify = "earlier turns were forgotten", "left"
    return table


def _shown(text: str | None) -> str:
    """How it begins; '?' where a file does not say."""
    return "?" if text is None else beginning(text)


def _lines(facts: Facts, nbytes: int) -> list[tuple[str, str]]:
    share = facts.mean_retained / facts.num_tokens
    budget = f", budget {in_words(facts.budget)}"
    profile = f", profile {facts.profile}" if facts.profile else ""
    return [
        ("document", ", ".join(facts.names) or "-"),
        ("model", f"{facts.model or '-'} ({facts.fingerprint}), {facts.dtype}"),
        ("tokens", f"{facts.num_tokens:,}"),
        ("kept", f"{facts.mean_retained:,.0f} per layer and KV head ({share:.1%})"),
        ("KV cache", f"{megabytes(facts.kv_nbytes)} MB; the full cache has {megabytes(facts.kv_nbytes_full)} MB"),
        ("file", f"{megabytes(nbytes)} MB"),
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
