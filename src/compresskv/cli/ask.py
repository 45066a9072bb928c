"""`compresskv ask`: one question about one document, by one method or several side by side."""

import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from compresskv import defaults
from compresskv.cli.automatic import why
from compresskv.cli.kept import check_unused, load_session, names_session
from compresskv.cli.meanwhile import held_by, told_end, told_held, told_notes
from compresskv.cli.options import (
    CandidatesOption,
    ChunkBudgetOption,
    ChunkTokensOption,
    CompileOption,
    DecodeBudgetOption,
    DecodeIntervalOption,
    DecodeMethodOption,
    PrefillMemoryOption,
    parse_candidates,
    parse_prefill_memory,
)
from compresskv.cli.outputs import check_outputs, check_writable
from compresskv.cli.request import Checked, Request
from compresskv.cli.spread import spread
from compresskv.cli.terminal import Bar, Building, Steps, Stream, counted, err, megabytes, new_table, out
from compresskv.compiled.modes import check_mode
from compresskv.errors import ConfigError
from compresskv.selection.cuts import CHUNK_TOKENS, DECODE_INTERVAL
from compresskv.selection.precision import NATIVE

if TYPE_CHECKING:
    from compresskv.answer import Generation
    from compresskv.methods.base import Method


@spread(Request)
def ask(
    given: Request,
    two_pass: Annotated[
        bool,
        typer.Option(
            "--two-pass",
            help="Read the prompt twice: an exact choice, never more than one whole layer held, twice the time.",
        ),
    ] = False,
    save_plan: Annotated[
        str | None, typer.Option(help="Write what is kept to this JSON file; implies --two-pass.", metavar="FILE")
    ] = None,
    compile: CompileOption = "auto",
    prefill_memory: PrefillMemoryOption = "auto",
    candidates: CandidatesOption = str(defaults.CANDIDATES),
    chunk_budget: ChunkBudgetOption = None,
    chunk_tokens: ChunkTokensOption = CHUNK_TOKENS,
    decode_budget: DecodeBudgetOption = None,
    decode_interval: DecodeIntervalOption = DECODE_INTERVAL,
    decode_method: DecodeMethodOption = None,
) -> None:
    """Answer a question about a document, keeping a small part of its KV cache.

    A file of 'compresskv read' is asked without reading the document again. The answer goes to standard output, what it
    cost to standard error.
    """
    check_mode(compile)
    memory, held = parse_prefill_memory(prefill_memory), parse_candidates(candidates)
    check_outputs({"save_plan": save_plan}, given.inputs)
    if save_plan is not None and given.compare:
        raise ConfigError("takes one method: leave out --compare", option="save_plan", value=save_plan)
    place = None if save_plan is None else check_writable("save_plan", save_plan, make_folder=False, kind="JSON")
    cuts: dict[str, Any] = {
        "chunk_budget": chunk_budget,
        "chunk_tokens": chunk_tokens,
        "decode_budget": decode_budget,
        "decode_interval": decode_interval,
        "decode_method": decode_method,
    }
    if names_session(given.document):
        reading = {"two_pass": two_pass, "save_plan": save_plan, "prefill_memory": prefill_memory}
        check_unused(**reading, candidates=candidates, **cuts)
        _ask_session(given, compile)
        return
    checked = given.checked()
    two_pass |= save_plan is not None
    if two_pass and any(one.lookahead for one in checked.methods):
        raise ConfigError("--two-pass and --save-plan cannot look ahead: leave lookahead out of the method")
    from compresskv.cache.cuts import CutOptions, find_cuts

    takes_profile = False
    for one in checked.methods:
        own = CutOptions(**held_by(one, checked, cuts))
        find_cuts(one, checked.budget, own, reads_twice=two_pass)  # refuses
        takes_profile |= own.needs_profile
    loaded, tokenizer, methods = checked.load()
    generations: list[Generation] = []
    try:
        for one in methods:
            options = {"two_pass": two_pass, "compile": compile, "prefill_memory": memory}
            options |= held_by(one, checked, {"candidates": held, "store": given.store, **cuts})
            options["profile"] = given.profile if takes_profile else None
            answer = _answer(loaded, tokenizer, checked, one, **options)
            command = ["--model", given.model, "--method", one.name]
            if given.profile is not None and one.needs_profile:
                command += ["--profile", str(given.profile)]
            generations.append(_with_command(answer, *command, dtype=given.dtype))
    finally:  # on Ctrl-C, what is there already is shown
        _report(generations, given, compile)
    if place is not None and generations[0].plan is not None:
        generations[0].plan.write(place)
        err.print(f"plan: {place}")


def _answer(model: Any, tokenizer: Any, checked: Checked, method: "Method", **options: Any) -> "Generation":
    from compresskv.generation import ask as answer
    from compresskv.system.memory import reset_peak

    given = checked.request
    reset_peak(model.device)  # each answer's own
    streams = not given.as_json and not given.compare
    with Bar() as bar, Stream(bar) if streams else nullcontext() as stream:
        steps = Steps(bar, method.name, given.max_new_tokens)
        return answer(
            model,
            tokenizer,
            checked.context,
            given.question,
            method=method,
            budget=checked.budget,
            max_new_tokens=given.max_new_tokens,
            truncate=given.truncate,
            on_text=stream,
            on_token=None if stream is not None else steps.answering,
            on_prefill=steps.reading,
            on_compile=Building(bar),
            **options,
        )


def _ask_session(given: Request, compile: str) -> None:
    """The answer from what was kept of a document that was read before."""
    given.check_session()
    session = load_session(given.document, given.model, given.dtype, given.device)
    with Bar() as bar, nullcontext() if given.as_json else Stream(bar) as stream:
        steps = Steps(bar, "session", given.max_new_tokens)
        generation = session.ask(
            given.question,
            max_new_tokens=given.max_new_tokens,
            compile=compile,
            on_text=stream,
            on_token=None if stream is not None else steps.answering,
            on_compile=Building(bar),
        )
    facts = session.facts
    command = ["--model", facts.model, "--method", facts.method.partition("[")[0]]
    generation = _with_command(generation, *command, dtype=facts.loaded_dtype)
    _report([generation], replace(given, model=facts.model), compile)


def _with_command(generation: "Generation", *options: str, dtype: str | None) -> "Generation":
    """Where the answer says that `compresskv compile` would help, the whole command for this model and method."""
    if (reason := generation.stats.not_compiled) is None:
        return generation
    command = ["compresskv", "compile", *options]
    if generation.stats.store != NATIVE:
        command += ["--store", generation.stats.store]
    if dtype is not None:
        command += ["--dtype", dtype]
    reason = reason.replace("'compresskv compile'", f"`{shlex.join(command)}`")
    return replace(generation, stats=replace(generation.stats, not_compiled=reason))


def _report(generations: "list[Generation]", given: Request, compile: str) -> None:
    if not generations:
        return
    single = not given.compare
    if given.as_json:
        results: list[dict[str, Any]] = [{"model": given.model, **generation.to_dict()} for generation in generations]
        out.print_json(json.dumps(results[0] if single else results))
    elif single:
        err.print(_cost(generations[0], compile))
    else:
        out.print(_table(generations), soft_wrap=False)
        if cut_off := [one.stats.method for one in generations if one.stats.cut_off]:
            err.print(told_end(given.max_new_tokens, cut_off))
        for generation in generations:
            for line in told_notes(generation.stats.notes, generation.stats.method):
                err.print(line)


def _cost(generation: "Generation", compile: str) -> str:
    stats = generation.stats
    remark = f"\n[not compiled: {stats.not_compiled}]" if stats.not_compiled and compile == "always" else ""
    if stats.cut_off:
        remark += f"\n{told_end(stats.generated_tokens)}"
    remark += "".join(f"\n{line}" for line in told_notes(stats.notes))
    kept = sum(stats.retained_per_layer) / len(stats.retained_per_layer)
    speed = "" if stats.decode_tokens_per_s is None else f", then {stats.decode_tokens_per_s:.0f} tokens/s"
    if stats.compiled_tokens:
        speed += f" (compiled; {stats.compile_s:.1f} s of building or loading not counted)"
    cut = f" ({stats.truncated_tokens:,} cut from the middle)" if stats.truncated_tokens else ""
    if stats.decode is not None and stats.decode.num_cuts:
        speed += f" ({counted(stats.decode.num_cuts, 'cut')} by {stats.decode.method})"
    bits = "" if stats.store == NATIVE else f" in {stats.store}"
    sizes = f"{megabytes(stats.kv_nbytes_full)} -> {megabytes(stats.kv_nbytes)} MB"
    return (
        f"[{stats.method}: {stats.prompt_tokens:,} prompt tokens{cut}, {kept:,.0f} kept per layer "
        f"({stats.retained_fraction:.1%}){bits}{why(stats.auto)}"
        f"{told_held(stats.chunks, stats.candidates)}; KV cache {sizes}; "
        f"first token after {stats.time_to_first_token_s:.1f} s{speed}; "
        f"peak memory {megabytes(stats.peak_memory_nbytes)} MB; {stats.dtype}]{remark}"
    )


def _table(generations: "list[Generation]") -> Table:
    numbers = ("kept", "KV MB", "seconds")
    table = new_table("method", *numbers, "answer", numbers=numbers)
    table.columns[0].no_wrap = True
    table.columns[-1].ratio = 1
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
