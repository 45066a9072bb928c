"""`compresskv explain`: a page that shows which tokens of a document each layer keeps."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli.automatic import why
from compresskv.cli.kept import check_unused, load_session, names_session
from compresskv.cli.meanwhile import held_by, told_end, told_held, told_notes
from compresskv.cli.options import CandidatesOption, ChunkBudgetOption, ChunkTokensOption, parse_candidates
from compresskv.cli.outputs import check_outputs, check_writable
from compresskv.cli.request import Checked, Request
from compresskv.cli.spread import spread
from compresskv.cli.terminal import Bar, Steps, err, megabytes, out
from compresskv.cli.typed import is_typed
from compresskv.errors import ConfigError, PromptError
from compresskv.selection.cuts import CHUNK_TOKENS

if TYPE_CHECKING:
    from compresskv.explain.retention import Explanation, Report
    from compresskv.methods.base import Method

EPILOG = """\b
Examples:
  compresskv explain examples/ships_log.txt \\
      "What is the number that opens the brass lock?"
  compresskv explain log.txt "Who is the cook?" --budget 5% \\
      --compare snapkv,streaming_llm --html cook.html
  compresskv explain log.txt "Who is the cook?" \\
      --evidence "the cook, Tom Finch" --no-answer
  compresskv explain log.txt "Who is the cook?" --json > cook.json
  compresskv explain log.kvc "Who is the cook?"
"""

_DEFAULT_PAGE = "retention.html"


@spread(Request)
def explain(
    given: Request,
    html: Annotated[
        str | None, typer.Option("--html", help="The page to write. Default: retention.html.", metavar="FILE")
    ] = None,
    evidence: Annotated[
        list[str] | None,
        typer.Option(help="Text of the document to mark, such as where the answer stands; repeatable.", metavar="TEXT"),
    ] = None,
    no_answer: Annotated[bool, typer.Option("--no-answer", help="Show what is kept only: do not decode.")] = False,
    candidates: CandidatesOption = str(defaults.CANDIDATES),
    chunk_budget: ChunkBudgetOption = None,
    chunk_tokens: ChunkTokensOption = CHUNK_TOKENS,
) -> None:
    """Show which tokens of a document the KV cache keeps, in one HTML page that works offline.

    Each token is shaded by the share of layers and KV heads that keep it; the page steps through single layers.
    """
    if given.as_json and html is not None:
        raise ConfigError(": with --json no page is written; leave one of them out", option="html", value=html)
    name = _DEFAULT_PAGE if html is None else html
    page = Path(name)
    if not given.as_json:
        check_outputs({"html": page}, given.inputs)
        check_writable("html", name, make_folder=False, kind="HTML")
        if page.suffix.lower() not in ("", ".html", ".htm"):
            raise ConfigError(": a page is HTML; end its name with .html", option="html", value=name)
    if no_answer and is_typed("max_new_tokens"):
        problem = "is of no use with --no-answer: leave one of them out"
        raise ConfigError(problem, option="max_new_tokens", value=given.max_new_tokens)
    max_new_tokens = 0 if no_answer else given.max_new_tokens
    meanwhile = {"candidates": parse_candidates(candidates), "chunk_budget": chunk_budget, "chunk_tokens": chunk_tokens}
    if names_session(given.document):
        check_unused(**meanwhile)
        report = _report_of_session(given, evidence or [], max_new_tokens)
    else:
        report = _report_of_document(given, evidence or [], max_new_tokens, meanwhile)
    if given.as_json:
        out.print_json(json.dumps(report.to_dict()), indent=None)
    else:
        _write(page, report)


def _report_of_session(given: Request, evidence: list[str], max_new_tokens: int) -> "Report":
    given.check_session(least_tokens=0)
    session = load_session(given.document, given.model, given.dtype, given.device)
    from compresskv.explain.kept import explain_session

    with Bar() as bar:
        steps = Steps(bar, "session", max_new_tokens)
        report = explain_session(
            session, given.question, evidence, max_new_tokens=max_new_tokens, on_token=steps.answering
        )
    if len(report.prompt.evidence) < len(evidence):
        err.print("compresskv: some of the evidence does not occur in the document")
    _tell(report.explanations[0], report.dtype, max_new_tokens)
    return report


def _report_of_document(
    given: Request, evidence: list[str], max_new_tokens: int, meanwhile: dict[str, Any]
) -> "Report":
    checked = given.checked(least_tokens=0)
    held = _find_held(checked, meanwhile)
    for one in checked.methods:
        if one.lookahead:
            raise ConfigError(f"lookahead={one.lookahead} cannot be explained: nothing is evicted before the answer")
    _check_evidence(checked.context, evidence)
    return _report(checked, evidence, max_new_tokens, held)


def _find_held(checked: Checked, meanwhile: dict[str, Any]) -> list[dict[str, Any]]:
    """For each method what may be held while it reads the prompt, as `retention.explain` takes it."""
    from compresskv.cache.cuts import CutOptions, find_cuts

    found = []
    for one in checked.methods:
        own = held_by(one, checked, {**meanwhile, "store": checked.request.store})
        held = {name: own.pop(name) for name in ("candidates", "store")}
        found.append({"chunks": find_cuts(one, checked.budget, CutOptions(**own))[0], **held})
    return found


def _report(checked: Checked, evidence: list[str], max_new_tokens: int, held: list[dict[str, Any]]) -> "Report":
    from compresskv.explain.retention import Report
    from compresskv.explain.text import prompt_text
    from compresskv.models.quantize import weights_dtype
    from compresskv.prompts.prompt import build_prompt, room_for_prompt

    given, context = checked.request, checked.context
    loaded, tokenizer, methods = checked.load()
    room = room_for_prompt(loaded, max(1, max_new_tokens))
    prompt = build_prompt(tokenizer, context, given.question, max_tokens=room, truncate=given.truncate)
    text = prompt_text(tokenizer, prompt.input_ids[0].tolist(), context, given.question, evidence)
    if evidence and not text.evidence:
        err.print("compresskv: none of the evidence is left in the prompt: it was cut out of the document's middle")
    explanations = tuple(
        _explanation(loaded, tokenizer, prompt.input_ids, one, checked, max_new_tokens, own)
        for one, own in zip(methods, held, strict=True)
    )
    name = _shown_name(given.document)
    return Report(given.model, name, given.question, prompt.num_truncated, text, explanations, weights_dtype(loaded))


def _explanation(
    loaded: Any,
    tokenizer: Any,
    input_ids: Any,
    method: "Method",
    checked: Checked,
    max_new_tokens: int,
    held: dict[str, Any],
) -> "Explanation":
    from compresskv.explain.retention import explain as read
    from compresskv.models.quantize import weights_dtype

    with Bar() as bar:
        steps = Steps(bar, method.name, max_new_tokens)
        explanation = read(
            loaded,
            tokenizer,
            input_ids,
            method,
            checked.budget,
            max_new_tokens=max_new_tokens,
            on_prefill=steps.reading,
            on_token=steps.answering,
            **held,
        )
    _tell(explanation, weights_dtype(loaded), max_new_tokens)
    return explanation


def _tell(explanation: "Explanation", dtype: str, max_new_tokens: int) -> None:
    sizes = f"{megabytes(explanation.kv_nbytes_full)} -> {megabytes(explanation.kv_nbytes)} MB"
    retention = explanation.retention
    kept = f"{retention.fraction:.1%} of {retention.num_tokens:,} prompt tokens kept{why(explanation.auto)}"
    kept += told_held(explanation.chunks, explanation.candidates)
    err.print(f"[{explanation.method}: {kept}; KV {sizes}; {dtype}]")
    if explanation.cut_off:
        err.print(told_end(max_new_tokens, [explanation.method]))
    for line in told_notes(explanation.notes, explanation.method):
        err.print(line)


def _shown_name(document: str) -> str:
    return "standard input" if document == "-" else Path(document).name


def _write(page: Path, report: "Report") -> None:
    from compresskv.explain.page import retention_page
    from compresskv.system.files import write_text

    try:
        write_text(page, retention_page(report))
    except OSError as error:
        raise ConfigError(f"--html {str(page)!r}: {error.strerror}") from error
    out.print(str(page.resolve()))


def _check_evidence(context: str, evidence: list[str]) -> None:
    from compresskv.explain.text import occurrences

    for text in evidence:
        if not occurrences(context, text):
            raise PromptError("does not occur in the document", option="evidence", value=" ".join(text.split()))
