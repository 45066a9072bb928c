"""`compresskv read`: documents are read once and kept in files, to be asked later."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from compresskv.cli.kept import names_session
from compresskv.cli.meanwhile import told_notes
from compresskv.cli.options import JsonOption
from compresskv.cli.outputs import check_outputs
from compresskv.cli.places import check_places, choose_places
from compresskv.cli.reading import Reading
from compresskv.cli.spread import spread
from compresskv.cli.terminal import err, megabytes, out
from compresskv.errors import PromptError
from compresskv.selection.precision import NATIVE

if TYPE_CHECKING:
    from compresskv.sessions.facts import Facts

EPILOG = """\b
Examples:
  compresskv read report.txt
  compresskv read report.txt -o kept/report.kvc --budget '12.5% of bytes'
  compresskv read january.txt february.txt -o kept/ --store int8
  compresskv read novel.txt --chunk 1024 --max-memory 500MB
  compresskv ask report.kvc "Who signed the contract?"
"""


@spread(Reading)
def read(
    documents: Annotated[list[str], typer.Argument(help="Text files, or - for standard input.", metavar="DOCUMENT")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder, if one is there or PATH ends in a slash (then it is made): DOCUMENT.kvc is written into "
            "it. Else the file to write, of one document. Default: this folder.",
            metavar="PATH",
        ),
    ] = None,
    *,
    given: Reading,
    as_json: JsonOption = False,
) -> None:
    """Read documents once, without knowing what will be asked, and keep a part of each one's KV cache in a file.

    The file is asked by `compresskv ask` and `compresskv chat`, as often as you like. It holds the document's text.
    """
    for document in documents:
        if names_session(document):
            raise PromptError(f"document {document!r} is a session: it was read before, ask it")
    places = choose_places(documents, output)
    check_outputs({"output": list(places)}, {"document": documents, "profile": given.profile, "model": given.model})
    checked = given.checked(documents)
    check_places(documents, places)
    told = []
    for place, session in zip(places, checked.sessions(), strict=True):
        session.save(place)
        facts, nbytes = session.facts, place.stat().st_size
        told.append({**facts.to_dict(), "notes": facts.notes, "file": str(place), "file_nbytes": nbytes})
        if not as_json:
            out.print(str(place))
            err.print(f"[{_cost(facts)}; file {megabytes(nbytes)} MB]")
            for line in told_notes(facts.notes):
                err.print(line)
    if as_json:
        out.print_json(json.dumps(told))


def _cost(facts: "Facts") -> str:
    kept = f"{facts.mean_retained:,.0f} kept per layer ({facts.mean_retained / facts.num_tokens:.1%})"
    kept += "" if facts.store == NATIVE else f" in {facts.store}"
    sizes = f"{megabytes(facts.kv_nbytes_full)} -> {megabytes(facts.kv_nbytes)} MB"
    return (
        f"{facts.method}: {facts.num_tokens:,} tokens read in {facts.read_s:.1f} s, {kept}; KV cache {sizes}; "
        f"{facts.dtype}"
    )
