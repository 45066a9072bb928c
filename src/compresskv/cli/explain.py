"""`compresskv explain`: a page that shows which tokens of a document each layer keeps."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv.cli.options import (
    BudgetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    ProfileOption,
    SettingsOption,
    TruncateOption,
    create_methods,
)
from compresskv.cli.outputs import check_outputs
from compresskv.cli.terminal import Bar, err, megabytes, out
from compresskv.errors import ConfigError, PromptError
from compresskv.prompts.document import read_document

if TYPE_CHECKING:
    from compresskv.explain.retention import Explanation, Report
    from compresskv.methods.base import Method

EPILOG = """\b
Examples:
  compresskv explain examples/ships_log.txt "What is the number that opens the brass lock?"
  compresskv explain log.txt "Who is the cook?" --budget 5% --compare snapkv,streaming_llm --html cook.html
  compresskv explain log.txt "Who is the cook?" --evidence "the cook, Tom Finch" --no-answer
  compresskv explain log.txt "Who is the cook?" --json > cook.json
"""

_DEFAULT_PAGE = Path("retention.html")


def explain(
    document: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="The page to write. Default: retention.html.", metavar="FILE")
    ] = None,
    evidence: Annotated[
        list[str] | None,
        typer.Option(help="Text of the document to mark, such as where the answer stands; repeatable.", metavar="TEXT"),
    ] = None,
    model: ModelOption = "smollm2-135m",
    method: MethodOption = "blend",
    budget: BudgetOption = "256",
    compare: Annotated[
        str, typer.Option(help="More methods, separated by commas; each gets a tab.", metavar="METHODS")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer; 0 for none.", metavar="N")] = 128,
    no_answer: Annotated[bool, typer.Option("--no-answer", help="Show what is kept only: do not decode.")] = False,
    truncate: TruncateOption = "never",
    profile: ProfileOption = None,
    settings: SettingsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which tokens of a document the KV cache keeps, in one HTML page that works offline.

    Each token is shaded by the share of layers and KV heads that keep it; the page steps through single layers.
    """
    if as_json and html is not None:
        raise ConfigError(f"--html {str(html)!r}: with --json no page is written; leave one of them out")
    page = _DEFAULT_PAGE if html is None else html
    if not as_json:
        check_outputs({"html": page}, {"document": document, "profile": profile, "model": model})
        _check_page(page)
    context = read_document(document)
    marked = evidence or []
    from compresskv.selection.budgets import parse_budget

    request: dict[str, Any] = {
        "budget": parse_budget(budget),
        "max_new_tokens": 0 if no_answer else _at_least_0(max_new_tokens),
    }
    chosen = create_methods(method, compare, settings)
    for one in chosen:
        if one.lookahead:
            raise ConfigError(f"lookahead={one.lookahead} of {one.label!r}: nothing is evicted before the answer")
    from compresskv.methods.prepare import prepare_method
    from compresskv.models.load import load
    from compresskv.prompts.prompt import check_request

    check_request(context, question, truncate)
    _check_evidence(context, marked)
    with Bar() as bar:
        loaded, tokenizer = load(model, dtype=dtype, device=device, on_progress=bar)
    prepared = [prepare_method(loaded, one, profile if one.needs_profile else None) for one in chosen]
    report = _report(loaded, tokenizer, context, question, marked, prepared, request, truncate, (model, document))
    if as_json:
        out.print_json(json.dumps(report.to_dict()), indent=None)
    else:
        _write(page, report)


def _report(
    loaded: Any,
    tokenizer: Any,
    context: str,
    question: str,
    evidence: list[str],
    methods: "list[Method]",
    request: dict[str, Any],
    truncate: str,
    names: tuple[str, str],
) -> "Report":
    from compresskv.explain.retention import Report, prompt_text
    from compresskv.prompts.prompt import build_prompt, room_for_prompt

    room = room_for_prompt(loaded, max(1, request["max_new_tokens"]))
    prompt = build_prompt(tokenizer, context, question, max_tokens=room, truncate=truncate)
    text = prompt_text(tokenizer, prompt.input_ids[0].tolist(), context, question, evidence)
    if evidence and not text.evidence:
        err.print("compresskv: none of the evidence is left in the prompt: it was cut out of the document's middle")
    explanations = tuple(_explanation(loaded, tokenizer, prompt.input_ids, one, request) for one in methods)
    return Report(names[0], _shown_name(names[1]), question, prompt.num_truncated, text, explanations)


def _explanation(
    loaded: Any, tokenizer: Any, input_ids: Any, method: "Method", request: dict[str, Any]
) -> "Explanation":
    from compresskv.explain.retention import explain as read

    with Bar() as bar:
        show = partial(_show_layers, bar, method.name)
        explanation = read(loaded, tokenizer, input_ids, method, on_prefill=show, **request)
    sizes = f"{megabytes(explanation.kv_nbytes_full)} -> {megabytes(explanation.kv_nbytes)} MB"
    retention = explanation.retention
    err.print(f"[{method.name}: {retention.fraction:.1%} of {retention.num_tokens:,} prompt tokens kept; KV {sizes}]")
    return explanation


def _show_layers(bar: Bar, name: str, done: int, layers: int) -> None:
    bar(f"{name}: reading" if done < layers else f"{name}: answering", done / layers)


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


def _check_page(page: Path) -> None:
    """Refuse, before a model is loaded, a page that cannot be written."""
    if page.is_dir():
        raise ConfigError(f"--html {str(page)!r} is a folder: name a file in it")
    if not page.absolute().parent.is_dir():
        raise ConfigError(f"--html {str(page)!r}: there is no folder {str(page.absolute().parent)!r}")


def _check_evidence(context: str, evidence: list[str]) -> None:
    from compresskv.explain.retention import occurrences

    for text in evidence:
        if not occurrences(context, text):
            raise PromptError("does not occur in the document", option="evidence", value=" ".join(text.split()))


def _at_least_0(max_new_tokens: int) -> int:
    if max_new_tokens < 0:
        raise ConfigError("must not be negative", option="max_new_tokens", value=max_new_tokens)
    return max_new_tokens
