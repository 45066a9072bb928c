"""`compresskv ask`: one question about one document, by one method or several side by side."""

import json
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from compresskv.cli.options import (
    BudgetOption,
    CompileOption,
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
from compresskv.cli.terminal import Bar, Building, err, megabytes, out
from compresskv.compiled.modes import check_mode
from compresskv.errors import ConfigError
from compresskv.prompts.document import read_document

if TYPE_CHECKING:
    from compresskv.generation import Generation
    from compresskv.methods.base import Method


def ask(
    document: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: ModelOption = "smollm2-135m",
    method: MethodOption = "blend",
    budget: BudgetOption = "256",
    compare: Annotated[
        str, typer.Option(help="More methods, separated by commas; prints one table.", metavar="METHODS")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", metavar="N")] = 128,
    truncate: TruncateOption = "never",
    two_pass: Annotated[
        bool,
        typer.Option(
            "--two-pass", help="Read the prompt twice, never holding more than one whole layer; takes twice as long."
        ),
    ] = False,
    save_plan: Annotated[
        Path | None, typer.Option(help="Write what is kept to this JSON file; implies --two-pass.", metavar="FILE")
    ] = None,
    compile: CompileOption = "auto",
    profile: ProfileOption = None,
    settings: SettingsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about a document, keeping a small part of its KV cache.

    The answer goes to standard output, what it cost to standard error.
    """
    check_mode(compile)
    check_outputs({"save_plan": save_plan}, {"document": document, "profile": profile, "model": model})
    context = read_document(document)
    from compresskv.selection.budgets import parse_budget

    if save_plan is not None and compare:
        raise ConfigError(f"--save-plan {str(save_plan)!r} takes one method: leave out --compare")
    if save_plan is not None and (save_plan.is_dir() or not save_plan.parent.is_dir()):
        raise ConfigError(f"--save-plan {str(save_plan)!r} cannot be written: no such folder, or a folder itself")
    request: dict[str, Any] = {
        "budget": parse_budget(budget),
        "max_new_tokens": max_new_tokens,
        "truncate": truncate,
        "two_pass": two_pass or save_plan is not None,
        "compile": compile,
    }
    chosen = create_methods(method, compare, settings)
    if request["two_pass"] and any(one.lookahead for one in chosen):
        raise ConfigError("--two-pass and --save-plan cannot look ahead: leave out --set lookahead")
    from compresskv.methods.prepare import prepare_method
    from compresskv.models.load import load
    from compresskv.prompts.prompt import check_request

    check_request(context, question, truncate)
    with Bar() as bar:
        loaded, tokenizer = load(model, dtype=dtype, device=device, on_progress=bar)
    # All profiles are found before the first prefill: a missing one must not cost the others' answers.
    prepared = [prepare_method(loaded, one, profile if one.needs_profile else None) for one in chosen]
    generations: list[Generation] = []
    try:
        for one in prepared:
            answer = _answer(loaded, tokenizer, context, question, one, request, not as_json and not compare)
            generations.append(_with_command(answer, model, one, profile, dtype))
    finally:  # on Ctrl-C, what is there already is shown
        _report(generations, single=not compare, as_json=as_json, model=model, compile=compile)
    if save_plan is not None and generations[0].plan is not None:
        generations[0].plan.write(save_plan)


def _answer(
    model: Any, tokenizer: Any, context: str, question: str, method: "Method", request: dict[str, Any], streams: bool
) -> "Generation":
    from compresskv.generation import ask as answer

    with Bar() as bar:
        stream = _Stream(bar, enabled=streams)
        show = partial(_show_layers, bar, method.name)
        generation = answer(
            model,
            tokenizer,
            context,
            question,
            method=method,
            on_text=stream,
            on_prefill=show,
            on_compile=Building(bar),
            **request,
        )
    stream.finish()
    return generation


def _with_command(
    generation: "Generation", model: str, method: "Method", profile: Path | None, dtype: str | None
) -> "Generation":
    """Where the answer says that `compresskv compile` would help, the whole command for this model and method."""
    if (reason := generation.stats.not_compiled) is None:
        return generation
    command = ["compresskv", "compile", "--model", model, "--method", method.name]
    if profile is not None and method.needs_profile:
        command += ["--profile", str(profile)]
    if dtype is not None:
        command += ["--dtype", dtype]
    reason = reason.replace("'compresskv compile'", f"`{shlex.join(command)}`")
    return replace(generation, stats=replace(generation.stats, not_compiled=reason))


def _show_layers(bar: Bar, name: str, done: int, layers: int) -> None:
    bar(f"{name}: reading", done / layers)


class _Stream:
    """Writes the answer as it comes; the progress bar makes way first."""

    def __init__(self, bar: Bar, *, enabled: bool) -> None:
        self._bar = bar
        self._enabled = enabled
        self._started = False

    def __call__(self, text: str) -> None:
        if self._enabled:
            self._bar.stop()
            self._started = True
            sys.stdout.write(text)
            sys.stdout.flush()

    def finish(self) -> None:
        if self._started:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _report(generations: "list[Generation]", *, single: bool, as_json: bool, model: str, compile: str) -> None:
    if not generations:
        return
    if as_json:
        results: list[dict[str, Any]] = [{"model": model, **generation.to_dict()} for generation in generations]
        out.print_json(json.dumps(results[0] if single else results))
    elif single:
        err.print(_cost(generations[0], compile))
    else:
        out.print(_table(generations), soft_wrap=False)


def _cost(generation: "Generation", compile: str) -> str:
    stats = generation.stats
    remark = f"\n[not compiled: {stats.not_compiled}]" if stats.not_compiled and compile == "always" else ""
    kept = sum(stats.retained_per_layer) / len(stats.retained_per_layer)
    speed = "" if stats.decode_tokens_per_s is None else f", then {stats.decode_tokens_per_s:.0f} tokens/s"
    if stats.compiled_tokens:
        speed += f" (compiled; {stats.compile_s:.1f} s of building or loading not counted)"
    cut = f" ({stats.truncated_tokens:,} cut from the middle)" if stats.truncated_tokens else ""
    return (
        f"[{stats.method}: {stats.prompt_tokens:,} prompt tokens{cut}, {kept:,.0f} kept per layer "
        f"({stats.retained_fraction:.1%}); KV cache {megabytes(stats.kv_nbytes_full)} -> "
        f"{megabytes(stats.kv_nbytes)} MB; first token after {stats.time_to_first_token_s:.1f} s{speed}; "
        f"peak memory {megabytes(stats.peak_memory_nbytes)} MB; {stats.dtype}]{remark}"
    )


def _table(generations: "list[Generation]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for title in ("kept", "KV MB", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("answer", ratio=1)
    for generation in generations:
        stats = generation.stats
        kept = sum(stats.retained_per_layer) / len(stats.retained_per_layer)
        seconds = f"{stats.time_to_first_token_s + stats.compile_s + stats.decode_s:.1f}"
        answer = " ".join(generation.answer.split())
        table.add_row(stats.method, f"{kept:,.0f}", megabytes(stats.kv_nbytes), seconds, answer, end_section=True)
    first = generations[0].stats
    table.caption = f"{first.prompt_tokens:,} prompt tokens; kept: mean tokens per KV head and layer"
    table.caption_justify = "left"
    return table
