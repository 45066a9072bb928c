"""The run, or a suite's runs, that `compresskv eval` goes through, and what it tells of them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskv.cli.outputs import check_future_folder
from compresskv.cli.report import group_tables, in_short
from compresskv.cli.terminal import Bar, counted, err, out
from compresskv.errors import ConfigError, DataError
from compresskv.system.check import check_known
from compresskv.system.paths import exists
from compresskv.system.progress import Progress

if TYPE_CHECKING:
    from compresskv.evaluation.evaluation import Counts, Evaluation
    from compresskv.evaluation.press_request import PressRequest
    from compresskv.evaluation.run_options import RunOptions
    from compresskv.methods.base import Method


@dataclass(frozen=True)
class Runs:
    """Where they lie, and what each is begun with."""

    output: Path
    options: "dict[str, RunOptions]"
    """By the names of their folders in `output`, which itself has the name ''."""
    left_out: Sequence[str] = ()
    """Tasks of a suite for which there are no data."""

    @property
    def is_suite(self) -> bool:
        """Whether each run has a folder of its own."""
        return "" not in self.options

    @property
    def own_settings(self) -> tuple[str, ...]:
        """Those of all tasks, each once."""
        return tuple(dict.fromkeys(setting for one in self.options.values() for setting in one.own_settings))

    def evaluate(
        self,
        methods: "dict[str, Method]",
        stores: tuple[str, ...],
        request: "PressRequest",
        profile: Path | None,
        *,
        own_settings: bool,
        as_json: bool,
    ) -> None:
        """Run our methods as the presses of `request` are: on its model, at its budgets, in its settings.

        Raises:
            CompressKVError: as for `Evaluation`, its runs, and for loading the model.
        """
        from compresskv.evaluation.configurations import configurations
        from compresskv.evaluation.evaluation import Evaluation
        from compresskv.models.load import load
        from compresskv.peers.process import peers_python
        from compresskv.profiles.profile import read_profile

        if self.left_out:
            err.print(f"without --data: {', '.join(self.left_out)} left out")
        if profile is not None:
            read_profile(profile)
        python = peers_python() if request.presses else None  # looked for before anything is computed
        self._check_folders(request.model)
        with Bar() as bar, ExitStack() as stack:
            loaded, tokenizer = load(request.model, dtype=request.dtype, device=request.device, on_progress=bar)
            prepared = configurations(loaded, methods, request.budgets, request.settings, profile, stores)
            opened = [
                stack.enter_context(Evaluation(loaded, tokenizer, options, self.output / name))
                for name, options in self.options.items()
            ]
            try:
                for progress, evaluation in _shares(bar, opened):
                    evaluation.run(prepared, progress, own_settings=own_settings)
                    if python is not None:
                        evaluation.run_peers(python, request, progress, own_settings=own_settings)
            finally:  # on Ctrl-C, what was done is said too
                bar.stop()
                self._tell(opened, len(prepared), as_json=as_json)

    def _check_folders(self, model: str) -> None:
        if self.is_suite and exists(self.output / "run.json"):
            problem = "holds a run that is no suite: give another folder"
            raise DataError(problem, option="output", value=str(self.output))
        for name, options in self.options.items():
            check_future_folder("output", self.output / name, ("records.jsonl", "run.lock"))
            options.check_folder(self.output / name, model)

    def _tell(self, opened: "Sequence[Evaluation]", num_configurations: int, *, as_json: bool) -> None:
        from compresskv.evaluation.summary import report_data

        counts, data = _sum(opened), None
        has_records = any(evaluation.log.records() for evaluation in opened)
        if self.is_suite and has_records:
            data = report_data([evaluation.log.folder for evaluation in opened])
        if as_json:
            told = {"run": str(self.output), "configurations": num_configurations, **asdict(counts)}
            out.print_json(json.dumps(told | ({} if data is None else {"models": list(map(in_short, data["models"]))})))
            return
        for failure in counts.peer_failures:
            err.print(f"peer failed: {failure}")
        for section in [] if data is None else data["models"]:
            for table in group_tables(section):
                out.print(table, soft_wrap=False)
        out.print(
            f"{counted(counts.examples, 'example')} ({counts.truncated} cut, {counts.skipped} skipped), "
            f"{counted(num_configurations, 'configuration')}: {counted(counts.records, 'new record')} from "
            f"{counted(counts.prefills, 'prefill')}."
        )
        if has_records:
            records = self.output / ("*/records.jsonl" if self.is_suite else "records.jsonl")
            out.print(f"records: {records}; tables and figures: compresskv report {self.output}")


def find_runs(output: Path, suite: str | None, own: dict[str, Any], shared: dict[str, Any]) -> Runs:
    """The runs that are asked for.

    Args:
        own: options that a suite settles, as far as they are given.
        shared: the others.
    Raises:
        ConfigError, DataError: an unknown suite, an option that it settles, or as for `RunOptions`.
    """
    from compresskv.evaluation.run_options import RunOptions
    from compresskv.evaluation.suite import SUITES, suite_runs

    if suite is None:
        return Runs(output, {"": RunOptions(**{"tasks": ("needle",), **own, **shared})})
    check_known("suite", suite, SUITES)
    for option, value in own.items():
        given = ",".join(map(str, value)) if isinstance(value, tuple) else value
        raise ConfigError("is settled by the suite: leave it out", option=option, value=given)
    return Runs(output, *suite_runs(suite, **shared))


def _shares(bar: Progress, opened: "Sequence[Evaluation]") -> "Iterator[tuple[Progress, Evaluation]]":
    """Each run, and what tells its progress as a part of all."""
    total, before = sum(len(evaluation.cases) for evaluation in opened) or 1, 0
    for evaluation in opened:
        begun, share = before, len(evaluation.cases)

        def progress(message: str, fraction: float | None, begun: int = begun, share: int = share) -> None:
            bar(message, None if fraction is None else (begun + share * fraction) / total)

        yield progress, evaluation
        before += share


def _sum(opened: "Sequence[Evaluation]") -> "Counts":
    """What all of them did."""
    from compresskv.evaluation.evaluation import Counts

    parts = [vars(evaluation.counts) for evaluation in opened]
    return Counts(**{name: sum((part[name] for part in parts), type(value)()) for name, value in parts[0].items()})
