"""`compresskv eval`: what each method loses, measured on benchmarks."""

from pathlib import Path
from typing import Annotated

import typer

from compresskv import defaults
from compresskv.cli.evaluation_runs import find_runs
from compresskv.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfOption,
    ProfileOption,
    budget_help,
    parse_numbers,
    split_names,
)
from compresskv.cli.outputs import check_outputs
from compresskv.selection.budget_words import ANY
from compresskv.selection.budgets import TOKENS
from compresskv.selection.precision import NATIVE, PRECISIONS

EPILOG = """\b
Examples:
  compresskv eval --tasks needle --lengths 1024,2048 --budgets 64,128 \\
      -o runs/needle
  compresskv eval --tasks longbench --subsets hotpotqa,samsum --data ~/data \\
      -o runs/longbench
  compresskv eval --tasks needle \\
      --methods 'full,snapkv[window_size=32],vote' --no-answers -o runs/quick
  compresskv eval --tasks needle --peers SnapKVPress,KnormPress -o runs/needle
  compresskv eval --tasks questions --methods kvzip,forecast,snapkv \\
      --budgets 12.5% -o runs/questions
  compresskv eval --suite standard --data ~/data -o runs/standard
  compresskv report runs/needle

A run that was stopped goes on where it was when the same command is given again; more methods, budgets and peers can
be added to it.
"""


def evaluate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the run's records; made if missing.", metavar="RUN")
    ],
    suite: Annotated[
        str | None,
        typer.Option(
            help="'standard': six tasks of fixed prompts instead of --tasks, with ten methods unless --methods says "
            "otherwise. Tasks that need --data are left out without it.",
            metavar="SUITE",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="needle, ruler, instructions, questions, longbench, babilong; several with commas. Default: needle.",
            metavar="TASKS",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="See 'compresskv methods'; with options: snapkv[window_size=32]. Default: all.", metavar="METHODS"
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help=f"{budget_help(*ANY)}; several, separated by commas. Default: 64,128,256; of a suite, 128.",
            metavar="BUDGETS",
        ),
    ] = None,
    of: OfOption = TOKENS,
    stores: Annotated[
        str,
        typer.Option(
            help=f"In how many bits a number what is kept is held: {', '.join(PRECISIONS)}.", metavar="STORES"
        ),
    ] = NATIVE,
    model: ModelOption = defaults.MODEL,
    data: Annotated[Path | None, typer.Option(help="Folder with benchmark files.", metavar="FOLDER")] = None,
    haystack: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file or folder to hide needles in; may be repeated. Default: Python's help topics.",
            metavar="PATH",
        ),
    ] = None,
    subsets: Annotated[
        str, typer.Option(help="Only these subsets of the tasks, such as hotpotqa,qa1-1k.", metavar="SUBSETS")
    ] = "",
    lengths: Annotated[
        str | None,
        typer.Option(help="Lengths of prompts that are made here. Default: 1024,2048,4096.", metavar="LENGTHS"),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Where needles are hidden, per cent. Default: 0,25,50,75,100.", metavar="DEPTHS")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Cases of each subset and length; for needles, of each depth, too; for questions, documents.",
            metavar="N",
        ),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            help="Which cases of each subset, of those within --limit, as a slice: 1::2 is every second one.",
            metavar="SLICE",
        ),
    ] = "",
    settings: Annotated[
        str | None,
        typer.Option(
            help="'aware': the question is known when tokens are chosen; 'agnostic': it comes after. Default: 'aware', "
            "and for the task questions 'agnostic'.",
            metavar="SETTINGS",
        ),
    ] = None,
    too_long: Annotated[
        str | None,
        typer.Option(help="Prompts above the limit: 'cut' their middle, or 'skip' them. Default: cut.", metavar="WAY"),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="A limit below the model's context.", metavar="TOKENS")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Shorten the benchmark's answer lengths.", metavar="TOKENS")
    ] = None,
    answers: Annotated[
        bool, typer.Option(help="Decode an answer with each cache; without, recall and fidelity only.")
    ] = True,
    peers: Annotated[
        str, typer.Option(help="kvpress presses to run too: KnormPress,ChunkKVPress(SnapKVPress).", metavar="PRESSES")
    ] = "",
    peer_budget: Annotated[
        str,
        typer.Option(
            help="What a press that masks without freeing is charged with: the 'tokens' it leaves unmasked or, "
            "with 'bytes', all tokens it holds. What is run stays the same.",
            metavar="UNIT",
        ),
    ] = "tokens",
    seed: Annotated[int, typer.Option(help="Of everything random.", metavar="SEED")] = 0,
    exact_prefill: Annotated[
        bool | None,
        typer.Option(help="Read prompts by PyTorch's attention alone. Default: what COMPRESSKV_EXACT_PREFILL says."),
    ] = None,
    profile: ProfileOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what methods lose: benchmark scores, evidence recall, and fidelity to the full cache.

    Each prompt is read once, and every method and budget cuts its own cache from that.
    """
    from compresskv.evaluation.configurations import check_settings, parse_budgets, parse_names
    from compresskv.evaluation.press_request import PressRequest
    from compresskv.evaluation.records import SETTINGS
    from compresskv.evaluation.run_options import parse_rows
    from compresskv.evaluation.suite import BUDGETS, METHODS
    from compresskv.evaluation.tasks.registry import tasks as known_tasks
    from compresskv.methods.registry import methods as registered
    from compresskv.methods.registry import parse_methods

    records = [output / name for name in ("run.json", "records.jsonl")]
    check_outputs({"output": records}, {"haystack": haystack, "profile": profile, "model": model})
    own = {
        "tasks": None if tasks is None else parse_names("tasks", tasks, list(known_tasks())),
        "subsets": split_names(subsets) or None,
        "lengths": parse_numbers("lengths", lengths, int),
        "depths": parse_numbers("depths", depths, float),
        "limit": limit,
        "rows": parse_rows(rows) if rows else None,
        "too_long": too_long,
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
    }
    chosen = {name: value for name, value in own.items() if value is not None}
    shared = {
        "data": data,
        "haystack": tuple(haystack or ()),
        "seed": seed,
        "answers": answers,
        "exact_prefill": exact_prefill,
    }
    runs = find_runs(output, suite, chosen, shared)
    usual = (",".join(registered()), "64,128,256") if suite is None else (METHODS, BUDGETS)
    named = parse_methods("methods", usual[0] if methods is None else methods)
    counts = parse_budgets(usual[1] if budgets is None else budgets, of)
    held = parse_names("stores", stores, tuple(PRECISIONS))
    in_settings = runs.own_settings if settings is None else parse_names("settings", settings, SETTINGS)
    check_settings(named, counts, in_settings)
    request = PressRequest(model, (), split_names(peers), counts, in_settings, dtype, device, peer_budget)
    runs.evaluate(named, held, request, profile, own_settings=settings is None, as_json=as_json)
