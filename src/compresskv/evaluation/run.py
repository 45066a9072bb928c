"""A whole evaluation: examples of several tasks, every configuration, records on disk, peers beside them."""

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import compresskv
from compresskv.errors import ConfigError
from compresskv.evaluation.peer_records import peer_records
from compresskv.evaluation.records import Record, RecordLog
from compresskv.evaluation.runner import Case, Configuration, Runner
from compresskv.evaluation.task import Task, TaskSettings, create_task
from compresskv.prompts import room_for_prompt
from compresskv.suggest import suggestion

Progress = Callable[[str, float], None]
TOO_LONG = ("cut", "skip")


@dataclass(frozen=True)
class Plan:
    """What to run. All of it but methods, budgets and peers is fixed once a run has begun."""

    tasks: tuple[str, ...]
    settings: TaskSettings
    too_long: str = "cut"
    """Prompts above the limit: 'cut' takes out their middle, 'skip' leaves them out."""
    max_prompt_tokens: int | None = None
    """None: what the model's context leaves beside the answer."""
    max_new_tokens: int | None = None
    """Shortens the benchmark's own answer lengths; None leaves them."""
    answers: bool = True

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise ConfigError(f"--too-long {self.too_long!r} is unknown: choose from {', '.join(TOO_LONG)}")
        for option in ("max_prompt_tokens", "max_new_tokens"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"--{option.replace('_', '-')} {value} must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        own = self.settings
        return {
            "tasks": list(self.tasks),
            "subsets": list(own.subsets),
            "data": None if own.data is None else own.data.name,
            "haystack": [path.name for path in own.haystack],
            "lengths": list(own.lengths),
            "depths": list(own.depths),
            "limit": own.limit,
            "seed": own.seed,
            "too_long": self.too_long,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_new_tokens": self.max_new_tokens,
            "answers": self.answers,
        }


@dataclass
class Counts:
    """What a run did."""

    examples: int = 0
    truncated: int = 0
    skipped: int = 0
    prefills: int = 0
    """Prompts read in this process, peers' aside."""
    records: int = 0
    """New records of this process."""
    peer_failures: int = 0


@dataclass(frozen=True)
class Evaluation:
    """A model, what to run on it, and where records go."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    log: RecordLog

    def cases(self, counts: Counts) -> list[Case]:
        """The prompts of all tasks; those that are too long cut or left out, and counted.

        Raises:
            DataError, ConfigError: as the tasks raise them.
        """
        cases = []
        runner = Runner(self.model, self.tokenizer)
        for task, settings in chosen_tasks(self.plan):
            for example in task.examples(settings):
                wanted = min(example.max_new_tokens, self.plan.max_new_tokens or example.max_new_tokens)
                room = room_for_prompt(self.model, wanted)
                limits = [limit for limit in (room, self.plan.max_prompt_tokens) if limit is not None]
                case = runner.case(task, replace(example, max_new_tokens=wanted), min(limits, default=None))
                counts.truncated += case.prompt.num_truncated > 0 and self.plan.too_long == "cut"
                if case.prompt.num_truncated and self.plan.too_long == "skip":
                    counts.skipped += 1
                else:
                    cases.append(case)
        counts.examples = len(cases)
        return cases

    def run(
        self, cases: Sequence[Case], configurations: Sequence[Configuration], counts: Counts, progress: Progress
    ) -> None:
        """Run what the log does not hold yet. A kill loses the configuration at hand, nothing more."""
        runner = Runner(self.model, self.tokenizer, self.plan.settings.seed, self.plan.answers, versions(self.model))
        for number, case in enumerate(cases):
            example = case.example
            progress(f"{example.task} {example.id}", number / len(cases))
            pending = [
                configuration
                for configuration in configurations
                if not self.log.has(example.task, example.id, configuration.name)
            ]
            if not pending:
                continue
            counts.prefills += 1
            for done, record in enumerate(runner.run(case, pending), 1):
                self.log.add(record)
                counts.records += 1
                progress(f"{example.task} {example.id}", (number + done / len(pending)) / len(cases))

    def run_peers(self, cases: Sequence[Case], request: "Any", counts: Counts, progress: Progress) -> Iterator[str]:
        """Run kvpress presses on the same cases; yields a line for each that failed."""
        full = {(record.task, record.example): record for record in self.log.records() if record.budget is None}
        with contextlib.closing(peer_records(request, cases, full, self.log)) as results:
            for fraction, result in results:
                progress("peers", fraction)
                if isinstance(result, Record):
                    self.log.add(result)
                    counts.records += 1
                else:
                    counts.peer_failures += 1
                    yield result


def chosen_tasks(plan: Plan) -> list[tuple[Task, TaskSettings]]:
    """The tasks, each with those of the chosen subsets that are its own.

    Raises:
        ConfigError: a subset that no task has.
    """
    chosen = [create_task(name) for name in plan.tasks]
    known = [subset for task in chosen for subset in task.default_subsets]
    for subset in plan.settings.subsets:
        if subset not in known:
            raise ConfigError(f"--subsets {subset!r} is unknown{suggestion(subset, known)}")
    pairs = []
    for task in chosen:
        own = tuple(subset for subset in plan.settings.subsets if subset in task.default_subsets)
        if own or not plan.settings.subsets:
            pairs.append((task, replace(plan.settings, subsets=own)))
    return pairs


def versions(model: PreTrainedModel) -> dict[str, str]:
    """What a record names beside its figures."""
    return {
        "compresskv": compresskv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "model": Path(model.config._name_or_path).name,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
