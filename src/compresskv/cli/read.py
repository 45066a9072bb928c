"""`compresskv read`: documents are read once and kept in files, to be asked later."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli.kept import names_session
from compresskv.cli.options import (
    BudgetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfOption,
    ProfileOption,
    SessionMethodOption,
    SettingsOption,
    StoreOption,
    check_profile,
    create_method,
    parse_nbytes,
)
from compresskv.cli.outputs import check_outputs
from compresskv.cli.places import check_places, choose_places, name_of
from compresskv.cli.terminal import Bar, err, megabytes, out
from compresskv.errors import ConfigError, PromptError
from compresskv.prompts.document import read_document
from compresskv.prompts.request import check_request
from compresskv.selection.budgets import TOKENS, known_beforehand, parse_budget
from compresskv.selection.precision import NATIVE, find_precision
from compresskv.system.check import check_least

if TYPE_CHECKING:
    from compresskv.methods.base import Method
    from compresskv.sessions.session import Session

EPILOG = """\b
Examples:
  compresskv read report.txt
  compresskv read report.txt -o kept/report.kvc --budget 25%
  compresskv read january.txt february.txt -o kept --store int8
  compresskv read novel.txt --chunk 1024 --max-memory 500MB
  compresskv ask report.kvc "Who signed the contract?"
"""

ChunkOption = Annotated[
    int | None,
    typer.Option(help="Tokens to read at a time, for less memory. Default: all at once.", metavar="N"),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Bytes that keys and values may take meanwhile, such as 500MB: longer documents are read in parts, "
        "each cut before the next. Default: all are held until the end.",
        metavar="SIZE",
    ),
]
SESSION_BUDGET = f"{defaults.SESSION_BUDGET:.0%}"


def read(
    documents: Annotated[list[str], typer.Argument(help="Text files, or - for standard input.", metavar="FILE...")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, or folder; a new folder ends in a slash. Default: FILE.kvc in this folder.",
            metavar="OUT",
        ),
    ] = None,
    model: ModelOption = defaults.MODEL,
    method: SessionMethodOption = None,
    budget: BudgetOption = SESSION_BUDGET,
    of: OfOption = TOKENS,
    store: StoreOption = NATIVE,
    chunk: ChunkOption = None,
    max_memory: MaxMemoryOption = None,
    profile: ProfileOption = None,
    settings: SettingsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read documents once, without knowing what will be asked, and keep a part of each one's KV cache in a file.

    The file is asked by `compresskv ask` and `compresskv chat`, as often as you like. It holds the document's text.
    """
    for document in documents:
        if names_session(document):
            raise PromptError(f"document {document!r} is a session: it was read before, ask it")
    places = choose_places(documents, output)
    check_outputs({"output": list(places)}, {"document": documents, "profile": profile, "model": model})
    chosen = chosen_method(method, settings)
    share = known_beforehand(parse_budget(budget, of))
    find_precision(store)
    check_least("chunk", chunk)
    most = None if max_memory is None else parse_nbytes("max_memory", max_memory)
    check_profile(profile)
    texts = [read_document(document) for document in documents]
    for text in texts:
        check_request(text, "?", "never")
    check_places(documents, places)
    loaded, tokenizer, prepared = load_for_reading(model, chosen, profile, dtype, device)
    told = []
    for document, text, place in zip(documents, texts, places, strict=True):
        given = {"store": store, "chunk": chunk, "max_memory": most}
        session = read_with_bar(loaded, tokenizer, text, prepared, share, document, **given)
        session.save(place)
        told.append({**session.facts.to_dict(), "file": str(place), "file_nbytes": place.stat().st_size})
        if not as_json:
            out.print(str(place))
            err.print(f"[{_cost(session)}; file {megabytes(place.stat().st_size)} MB]")
    if as_json:
        out.print_json(json.dumps(told))


def read_with_bar(
    loaded: Any,
    tokenizer: Any,
    text: str,
    method: "Method",
    budget: int | float | str,
    document: str,
    **given: Any,
) -> "Session":
    """The document's session; meanwhile a bar tells how much of it was read, and how long the rest will take.

    Args:
        given: more for `compresskv.read`.
    """
    from compresskv.sessions.begin import read as read_session

    name = name_of(document)
    with Bar() as bar:
        return read_session(
            loaded,
            tokenizer,
            text,
            method=method,
            budget=budget,
            name=name,
            on_read=lambda done, steps: bar(f"reading {name}", done / steps),
            **given,
        )


def load_for_reading(
    model: str, method: "Method | None", profile: Path | None, dtype: str | None, device: str | None
) -> "tuple[Any, Any, Method]":
    """The model, its tokenizer, and the method with its profile."""
    from compresskv.models.load import load
    from compresskv.sessions.begin import find_method

    with Bar() as bar:
        loaded, tokenizer = load(model, dtype=dtype, device=device, on_progress=bar)
    return loaded, tokenizer, find_method(loaded, method, profile)


def chosen_method(method: str | None, settings: list[str] | None) -> "Method | None":
    """The one that is named, with its settings; None: the default."""
    if method is not None:
        chosen = create_method(method, settings)
        if chosen.lookahead:
            problem = "looks ahead, but a document is cut before anything is asked: name another"
            raise ConfigError(problem, option="method", value=chosen.label)
        return chosen
    if settings:
        raise ConfigError("is an option of a method: name that by --method", option="settings", value=settings[0])
    return None


def _cost(session: "Session") -> str:
    facts = session.facts
    kept = f"{facts.mean_retained:,.0f} kept per layer ({facts.mean_retained / facts.num_tokens:.1%})"
    kept += "" if facts.store == NATIVE else f" in {facts.store}"
    sizes = f"{megabytes(facts.kv_nbytes_full)} -> {megabytes(facts.kv_nbytes)} MB"
    return (
        f"{facts.method}: {facts.num_tokens:,} tokens read in {facts.read_s:.1f} s, {kept}; KV cache {sizes}; "
        f"{facts.dtype}"
    )
