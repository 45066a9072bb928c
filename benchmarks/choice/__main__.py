"""`scripts/choose-default`: what candidate settings lose on several models, and which to choose by the worst case."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.choice.regret import Losses, choose, leave_one_out, losses, worst
from compresskv import defaults
from compresskv.errors import CompressKVError
from compresskv.evaluation.configurations import configurations, parse_budgets
from compresskv.evaluation.evaluation import Evaluation
from compresskv.evaluation.records import Record
from compresskv.evaluation.run_folder import read_run
from compresskv.evaluation.run_options import RunOptions, parse_rows
from compresskv.methods.registry import parse_methods
from compresskv.models.load import load

CANDIDATES = (
    "blend,blend[settled_layers=0],blend[settled_layers=6],blend[kernel_size=5],blend[kernel_size=15],"
    "blend[vote_weight=2],blend[vote_weight=4],blend[window_size=48],vote,cake,snapkv[window_size=16,kernel_size=15],"
    "snapkv[window_size=32,kernel_size=15],adakv[window_size=16,kernel_size=15],"
    "compresskv[window_size=16,kernel_size=15]"
)
GROUPS = {
    "needle/single": "needles",
    "needle/paraphrase": "needles",
    "needle/multi": "several needles",
    "needle/uuid": "several needles",
    "ruler/variable_tracking": "variables",
    "babilong": "babilong",
    **dict.fromkeys(["longbench/lcc", "longbench/repobench-p"], "code"),
    **dict.fromkeys(["longbench/gov_report", "longbench/qmsum", "longbench/multi_news"], "summaries"),
    **dict.fromkeys(["longbench/trec", "longbench/triviaqa", "longbench/samsum"], "few-shot"),
    "longbench": "questions",
}
"""Task or benchmark -> the group of tasks that it is counted in."""
LONGBENCH = (
    "narrativeqa,qasper,multifieldqa_en,hotpotqa,2wikimqa,musique,gov_report,qmsum,multi_news,trec,triviaqa,samsum,"
    "lcc,repobench-p"
)
BABILONG = "qa1-1k,qa2-1k,qa3-1k,qa1-2k,qa2-2k,qa3-2k"


def main() -> None:
    """Run what is missing, then print the tables."""
    options = _options()
    candidates = parse_methods("--candidates", options.candidates)
    runs = []
    for spec in options.models:
        model, _, profile = spec.partition("=")
        name = Path(model).stem or model
        print(f"{model}: loading", file=sys.stderr)
        loaded, tokenizer = load(model, dtype=options.dtype)
        wanted = configurations(loaded, candidates, parse_budgets(options.budgets), profile=profile or None)
        for kind, plan in _plans(options):
            folder = options.output / name / kind
            with Evaluation(loaded, tokenizer, plan, folder) as evaluation:
                print(f"{name}: {kind}, {evaluation.counts.examples} prompts", file=sys.stderr)
                evaluation.run(wanted, lambda *_: None)
            runs.append(folder)
        del loaded
    records = [record for folder in runs for record in read_run(folder)[1]]
    _print(losses(_known(records, set(candidates)), group_of), list(candidates))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/choose-default", description=__doc__)
    parser.add_argument(
        "models", nargs="*", default=[defaults.MODEL], metavar="MODEL[=PROFILE]", help="default: the embedded model"
    )
    parser.add_argument("--candidates", default=CANDIDATES, help="methods, as for 'compresskv eval --methods'")
    parser.add_argument("--budgets", default="64,128,256")
    parser.add_argument("--data", type=Path, help="folder with longbench/ and babilong/; without, made prompts only")
    parser.add_argument("--haystack", type=Path, action="append", default=[], help="as for 'compresskv eval'")
    parser.add_argument("--lengths", default="1024,1536", help="of made prompts, in tokens")
    parser.add_argument("--depths", default="20,50,80", help="of needles, in per cent")
    parser.add_argument("--rows", default=":4:2", help="START:STOP:STEP among the rows of each data file")
    parser.add_argument("--max-prompt-tokens", type=int, default=1600, help="longer prompts lose their middle")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype")
    parser.add_argument("--answers", action="store_true", help="decode answers, too: for 'compresskv report'")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/default"))
    return parser.parse_args()


def _plans(options: argparse.Namespace) -> Iterator[tuple[str, RunOptions]]:
    """What is run with each model, by the name of its folder."""
    shared = {"answers": options.answers, "max_new_tokens": options.max_new_tokens, "seed": options.seed}
    made: dict[str, Any] = {
        "haystack": tuple(options.haystack),
        "lengths": tuple(map(int, options.lengths.split(","))),
        "depths": tuple(map(float, options.depths.split(","))),
    }
    yield (
        "needle",
        RunOptions(tasks=("needle",), subsets=("single", "paraphrase", "multi", "uuid"), **made, **shared),
    )
    yield "ruler", RunOptions(tasks=("ruler",), subsets=("variable_tracking",), limit=2, **made, **shared)
    if options.data is not None:
        read: dict[str, Any] = {
            "data": options.data,
            "rows": parse_rows(options.rows),
            "max_prompt_tokens": options.max_prompt_tokens,
        }
        yield "longbench", RunOptions(tasks=("longbench",), subsets=tuple(LONGBENCH.split(",")), **read, **shared)
        yield "babilong", RunOptions(tasks=("babilong",), subsets=tuple(BABILONG.split(",")), **read, **shared)


def _known(records: list[Record], candidates: set[str]) -> list[Record]:
    """Without those of candidates that an earlier run had."""
    return [record for record in records if record.method in candidates]


def group_of(task: str) -> str:
    """The group that a task is counted in."""
    return GROUPS.get(task) or GROUPS[task.partition("/")[0]]


def _print(measured: Losses, candidates: list[str]) -> None:
    """The KL of every candidate in every cell, the candidates by their worst cell, and the choices."""
    print("\nKL divergence from the full cache, nats per token:\n")
    _table(
        ["cell", *candidates],
        [[str(cell), *(f"{own[name]:.3f}" for name in candidates)] for cell, own in measured.items()],
    )
    print("\nLoss over the best candidate's in the same cell, the largest and the geometric mean:\n")
    found = sorted(((worst(measured, name), name) for name in candidates), key=lambda pair: pair[0].regret)
    _table(
        ["candidate", "worst", "where", "mean"],
        [[name, f"{one.regret:.2f}", str(one.cell), f"{one.mean:.2f}"] for one, name in found],
    )
    print(f"\nChosen on all models: {choose(measured, candidates)}")
    for turn in leave_one_out(measured, candidates):
        print(
            f"Without {turn.held_out}: {turn.chosen} (worst {turn.seen.regret:.2f}); on {turn.held_out} its worst is "
            f"{turn.unseen.regret:.2f} ({turn.unseen.cell}), its mean {turn.unseen.mean:.2f}"
        )


def _table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    try:
        main()
    except CompressKVError as error:
        sys.exit(f"scripts/choose-default: {error}")
