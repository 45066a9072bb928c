"""`compresskv eval`: what each method loses, measured on benchmarks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compresskv import defaults
from compresskv.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OfOption,
    ProfileOption,
    parse_numbers,
    split_names,
)
from compresskv.cli.outputs import check_outputs
from compresskv.cli.terminal import Bar, counted, err, out
from compresskv.selection.budgets import TOKENS
from compresskv.selection.precision import NATIVE, PRECISIONS

if TYPE_CHECKING:
    from compresskv.evaluation.press_request import PressRequest
    from compresskv.evaluation.run import Evaluation, EvaluationConfig
    from compresskv.methods.base import Method

EPILOG = """\b
Examples:
  compresskv eval --tasks needle --lengths 1024,2048 --budgets 64,128 \\
      -o runs/needle
  compresskv eval --tasks longbench --subsets hotpotqa,samsum --data ~/data \\
      -o runs/longbench
  compresskv eval --tasks needle \\
      --methods 'full,snapkv[window_size=32],vote' --no-answers -o runs/quick
  compresskv eval --tasks needle --peers SnapKVPress,KnormPress -o runs/needle
  compresskv report runs/needle

A run that was stopped goes on where it was when the same command is given again; more methods, budgets and peers can
be added to it.
"""


def evaluate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the run's records; made if missing.", metavar="RUN")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="needle, ruler, instructions, questions, longbench, babilong; several with commas.", metavar="TASKS"
        ),
    ] = "needle",
    methods: Annotated[
        str | None,
        typer.Option(
            help="See 'compresskv methods'; with options: snapkv[window_size=32]. Default: all.", metavar="METHODS"
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Tokens per layer, shares of the prompt, or bytes in all layers together (3MB).")
    ] = "64,128,256",
    of: OfOption = TOKENS,
    stores: Annotated[
        str, typer.Option(help=f"In how many bits a number what is kept is held: {', '.join(PRECISIONS)}.")
    ] = NATIVE,
    model: ModelOption = defaults.MODEL,
    data: Annotated[Path | None, typer.Option(help="Folder with benchmark files.", metavar="DIR")] = None,
    haystack: Annotated[
        list[Path] | None,
        typer.Option(help="Text file or folder to hide needles in; may be repeated. Default: Python's help topics."),
    ] = None,
    subsets: Annotated[str, typer.Option(help="Only these subsets of the tasks: hotpotqa,qa1-1k.")] = "",
    lengths: Annotated[str, typer.Option(help="Prompt lengths of needle cases.")] = "1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Where needles are hidden, per cent.")] = "0,25,50,75,100",
    limit: Annotated[
        int | None, typer.Option(help="Cases of each subset; for needles, of each length and depth.")
    ] = None,
    rows: Annotated[
        str, typer.Option(help="Which cases of each subset, as a slice: 1::2 is every second one.", metavar="SLICE")
    ] = "",
    settings: Annotated[
        str | None,
        typer.Option(
            help="'aware': the question is known when tokens are chosen; 'agnostic': it comes after. Default: 'aware', "
            "and for the task questions 'agnostic'.",
            metavar="SETTINGS",
        ),
    ] = None,
    too_long: Annotated[str, typer.Option(help="Prompts above the limit: 'cut' their middle, or 'skip' them.")] = "cut",
    max_prompt_tokens: Annotated[int | None, typer.Option(help="A limit below the model's context.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Shorten the benchmark's answer lengths.")] = None,
    answers: Annotated[
        bool, typer.Option(help="Decode an answer with each cache; without, recall and fidelity only.")
    ] = True,
    peers: Annotated[str, typer.Option(help="kvpress presses to run too: KnormPress,ChunkKVPress(SnapKVPress).")] = "",
    peer_budget: Annotated[
        str,
        typer.Option(
            help="What a press that masks without freeing is charged with: the 'tokens' it leaves unmasked or, "
            "with 'bytes', all tokens it holds. What is run stays the same."
        ),
    ] = "tokens",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
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
    from compresskv.evaluation.configurations import parse_budgets, parse_names
    from compresskv.evaluation.press_request import PressRequest
    from compresskv.evaluation.run import EvaluationConfig, parse_rows
    from compresskv.evaluation.runner import SETTINGS
    from compresskv.evaluation.task import tasks as known_tasks
    from compresskv.methods.registry import methods as registered
    from compresskv.methods.registry import parse_methods

    records = [output / name for name in ("run.json", "records.jsonl")]
    check_outputs({"output": records}, {"haystack": haystack, "profile": profile, "model": model})
    config = EvaluationConfig(
        tasks=parse_names("tasks", tasks, list(known_tasks())),
        subsets=split_names(subsets),
        data=data,
        haystack=tuple(haystack or ()),
        lengths=parse_numbers("lengths", lengths, int) or (),
        depths=parse_numbers("depths", depths, float) or (),
        limit=limit,
        rows=parse_rows(rows),
        seed=seed,
        too_long=too_long,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        answers=answers,
        exact_prefill=exact_prefill,
    )
    chosen, counts = parse_methods("methods", methods or ",".join(registered())), parse_budgets(budgets, of)
    held = parse_names("stores", stores, tuple(PRECISIONS))
    presses = split_names(peers)
    in_settings = config.own_settings if settings is None else parse_names("settings", settings, SETTINGS)
    request = PressRequest(model, (), presses, counts, in_settings, dtype, device, peer_budget)
    _run(config, chosen, held, request, output, profile, own_settings=settings is None, as_json=as_json)


def _run(
    config: "EvaluationConfig",
    methods: "dict[str, Method]",
    stores: tuple[str, ...],
    request: "PressRequest",
    output: Path,
    profile: Path | None,
    *,
    own_settings: bool,
    as_json: bool,
) -> None:
    """Run our methods as the presses of `request` are: on its model, at its budgets, in its settings."""
    from compresskv.evaluation.configurations import configurations
    from compresskv.evaluation.run import Evaluation
    from compresskv.models.load import load
    from compresskv.peers.process import peers_python
    from compresskv.profiles.profile import read_profile

    if profile is not None:
        read_profile(profile)
    python = peers_python() if request.presses else None  # looked for before anything is computed
    config.check_folder(output, request.model)
    with Bar() as bar:
        loaded, tokenizer = load(request.model, dtype=request.dtype, device=request.device, on_progress=bar)
        prepared = configurations(loaded, methods, request.budgets, request.settings, profile, stores)
        with Evaluation(loaded, tokenizer, config, output) as evaluation:
            try:
                evaluation.run(prepared, bar, own_settings=own_settings)
                if python is not None:
                    evaluation.run_peers(python, request, bar, own_settings=own_settings)
            finally:  # on Ctrl-C, what was done is said too
                bar.stop()
                _finish(output, evaluation, len(prepared), as_json=as_json)


def _finish(output: Path, evaluation: "Evaluation", num_configurations: int, *, as_json: bool) -> None:
    counts = evaluation.counts
    if as_json:
        out.print_json(json.dumps({"run": str(output), "configurations": num_configurations, **asdict(counts)}))
        return
    for failure in counts.peer_failures:
        err.print(f"peer failed: {failure}")
    out.print(
        f"{counted(counts.examples, 'example')} ({counts.truncated} cut, {counts.skipped} skipped), "
        f"{counted(num_configurations, 'configuration')}: {counted(counts.records, 'new record')} from "
        f"{counted(counts.prefills, 'prefill')}."
    )
    out.print(f"records: {output / 'records.jsonl'}; tables and figures: compresskv report {output}")
