"""A whole evaluation: examples of several tasks, every configuration, records on disk, peers beside them."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.attention.prefill import reads_exactly
from compresskv.calibration.haystack import read_haystack
from compresskv.errors import ConfigError, DataError, PromptError
from compresskv.evaluation.encode import encode
from compresskv.evaluation.press_records import add_presses
from compresskv.evaluation.press_request import PressRequest
from compresskv.evaluation.records import RecordLog, check_run
from compresskv.evaluation.runner import FULL, Case, Configuration, Runner
from compresskv.evaluation.tasks.base import Task, TaskSettings, check_depths
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.jsonl import task_folder
from compresskv.evaluation.tasks.registry import create_task
from compresskv.models.fingerprint import fingerprint
from compresskv.models.quantize import weights_dtype
from compresskv.prompts.prompt import room_for_prompt
from compresskv.system.check import check_known, check_least
from compresskv.system.libraries import versions
from compresskv.system.paths import exists, is_folder, why_unseen
from compresskv.system.progress import Progress

TOO_LONG = ("cut", "skip")


@dataclass(frozen=True)
class EvaluationConfig:
    """What to run. All of it is fixed once a run has begun; only methods, budgets and peers can be added later."""

    tasks: tuple[str, ...]
    subsets: tuple[str, ...] = ()
    data: Path | None = None
    haystack: tuple[Path, ...] = ()
    lengths: tuple[int, ...] = TaskSettings.lengths
    depths: tuple[float, ...] = TaskSettings.depths
    limit: int | None = None
    rows: tuple[int | None, int | None, int | None] = (None, None, None)
    """(start, stop, step) among each subset's cases, as in a Python slice: (1, None, 2) is every second one."""
    seed: int = 0
    too_long: str = "cut"
    """Prompts above the limit: 'cut' takes out their middle, 'skip' leaves them out."""
    max_prompt_tokens: int | None = None
    """None: what the model's context leaves beside the answer."""
    max_new_tokens: int | None = None
    """Shortens the benchmark's own answer lengths; None leaves them."""
    answers: bool = True
    """Whether compressed caches decode answers."""
    exact_prefill: bool | None = None
    """As for `compressing`. What comes of it on this machine is what a run must keep to, and records note it."""

    def __post_init__(self) -> None:
        for option in ("lengths", "depths"):
            if not getattr(self, option):
                raise ConfigError("names no number", option=option, value=())
        if self.data is not None and not is_folder(self.data):
            raise DataError(f": {why_unseen(self.data) or 'no such folder'}", option="data", value=str(self.data))
        check_known("too_long", self.too_long, TOO_LONG)
        for option in ("limit", "max_prompt_tokens", "max_new_tokens"):
            check_least(option, getattr(self, option))
        self._check_cases()

    def _check_cases(self) -> None:
        """What the tasks would find wrong once a model is loaded, as far as it needs none."""
        check_depths(self.depths)
        for length in self.lengths:
            check_least("lengths", length)
        for path in self.haystack:
            if not exists(path):
                raise DataError(f": {why_unseen(path) or 'no such file or folder'}", option="haystack", value=path)
        if self.haystack:
            read_haystack(self.haystack)
        for task, _ in self.chosen_tasks():
            if task.needs:
                task_folder(task.name, self.data, task.needs)

    def chosen_tasks(self) -> list[tuple[Task, tuple[str, ...]]]:
        """The tasks, each with those of the chosen subsets that are its own; none of them means all.

        Raises:
            ConfigError: a subset that no task has.
        """
        chosen = [create_task(name) for name in self.tasks]
        known = [subset for task in chosen for subset in task.default_subsets]
        for subset in self.subsets:
            check_known("subsets", subset, known)
        own = [tuple(subset for subset in self.subsets if subset in task.default_subsets) for task in chosen]
        return [pair for pair in zip(chosen, own, strict=True) if pair[1] or not self.subsets]

    @property
    def own_settings(self) -> tuple[str, ...]:
        """Those of the tasks, each once."""
        return tuple(dict.fromkeys(task.setting for task, _ in self.chosen_tasks()))

    def task_settings(self, tokenizer: PreTrainedTokenizerBase, subsets: tuple[str, ...]) -> TaskSettings:
        """What one task is told."""
        shared = {field.name: getattr(self, field.name) for field in fields(TaskSettings) if hasattr(self, field.name)}
        return TaskSettings(**{**shared, "tokenizer": tokenizer, "subsets": subsets})

    def to_dict(self) -> dict[str, Any]:
        """For run.json: paths by their names alone, so that a run can be resumed from another folder."""
        paths = {"data": None if self.data is None else self.data.name, "haystack": [p.name for p in self.haystack]}
        return {name: value for name, value in asdict(self).items() if name != "exact_prefill"} | paths

    def check_folder(self, folder: Path, model: str) -> None:
        """Refuse the folder of another run, as far as that shows before a model is loaded.

        Args:
            model: what it will be loaded by.
        Raises:
            DataError: naming what differs.
        """
        prefill = {"exact_prefill": True} if self.exact_prefill else {}  # else the model's dtype and place decide
        check_run(folder, {**self.to_dict(), **versions(), **prefill, "model": Path(model).name})


@dataclass
class Counts:
    """What a run did."""

    examples: int = 0
    truncated: int = 0
    skipped: int = 0
    prefills: int = 0
    """Prompts read in this process, peers' aside."""
    records: int = 0
    """New ones."""
    peer_failures: list[str] = field(default_factory=list)


class Evaluation(AbstractContextManager["Evaluation"]):
    """A model, what to run on it, and the folder its records go to, which is this process's alone until the end."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluationConfig,
        folder: Path,
    ) -> None:
        """Open or resume a run.

        Raises:
            DataError: the folder holds a run of another config or model, or cannot be used.
            DataError, ConfigError: as the tasks raise them. The folder is not touched then.
            PromptError: a prompt cannot be cut to the limit.
        """
        self._model, self._tokenizer, self._config = model, tokenizer, config
        named, exact = _named(model), reads_exactly(model.device, model.dtype, config.exact_prefill)
        self._versions = {**named, "prefill": "exact" if exact else "fast"}
        configuration = {
            **config.to_dict(),
            **named,
            "exact_prefill": exact,
            "device": model.device.type,
            "weights": str(fingerprint(model)),
        }
        self.counts = Counts()
        self.cases = self._encoded()
        """The prompts of all tasks."""
        self.log = RecordLog(folder, configuration)

    def __exit__(self, *_: object) -> None:
        self.log.close()

    def _encoded(self) -> list[Case]:
        """Prompts that are too long are cut or left out, and counted."""
        cases = []
        for task, subsets in self._config.chosen_tasks():
            examples = task.examples(self._config.task_settings(self._tokenizer, subsets))
            for example in _sliced(examples, slice(*self._config.rows)):
                case = self._case(task, example)
                if case is None:
                    self.counts.skipped += 1
                else:
                    self.counts.truncated += case.prompt.num_truncated > 0
                    cases.append(case)
        if not cases and not self.counts.skipped:
            given = ":".join("" if part is None else str(part) for part in self._config.rows)
            raise DataError("leaves no case: no subset has so many", option="rows", value=given)
        self.counts.examples = len(cases)
        return cases

    def _case(self, task: Task, example: Example) -> Case | None:
        """None where the prompt is to be left out."""
        skips = self._config.too_long == "skip"
        wanted = min(example.max_new_tokens, self._config.max_new_tokens or example.max_new_tokens)
        limits = [room_for_prompt(self._model, wanted), self._config.max_prompt_tokens]
        max_tokens = min((limit for limit in limits if limit is not None), default=None)
        example = replace(example, max_new_tokens=wanted)
        try:
            prompt = encode(self._tokenizer, example, max_tokens)
        except PromptError:
            if skips:
                return None
            raise
        return None if skips and prompt.num_truncated else Case(task, example, prompt)

    def run(self, configurations: Sequence[Configuration], progress: Progress, *, own_settings: bool = False) -> None:
        """Run what the log does not hold yet. A kill loses the configurations that run side by side, nothing more.

        Args:
            own_settings: of each task, only configurations of its own setting are run.
        Raises:
            DataError: the run holds records of other prompts or of another profile.
        """
        self._check_profiles(configurations)
        config = self._config
        runner = Runner(self._model, self._tokenizer, config.seed, config.answers, self._versions, config.exact_prefill)
        number = 0
        for cases in _by_document(self.cases):
            progress("evaluating", number / len(self.cases))
            pending = [(case, self._pending(case, configurations, own_settings)) for case in cases]
            asked = [(case, missing) for case, missing in pending if missing]
            num_asked = sum(len(missing) for _, missing in asked)
            self.counts.prefills += bool(asked)
            for done, record in enumerate(runner.run_together(asked) if asked else (), 1):
                self.log.add(record)
                self.counts.records += 1
                progress("evaluating", (number + len(cases) * done / num_asked) / len(self.cases))
            number += len(cases)

    def _pending(self, case: Case, configurations: Sequence[Configuration], own_settings: bool) -> list[Configuration]:
        """Those that the log lacks of a case."""
        example = case.example
        self.log.check_prompt(example.task, example.id, case.prompt.sha256)
        wanted = [
            one for one in configurations if not own_settings or one.label == FULL or one.setting == case.task.setting
        ]
        return [one for one in wanted if not self.log.has(example.task, example.id, one.name)]

    def _check_profiles(self, configurations: Sequence[Configuration]) -> None:
        used = {one.label: one.profile_digest for one in configurations}
        for record in self.log.records():
            known = record.versions.get("profile")
            if record.method in used and known != used[record.method]:
                raise DataError(
                    f"{record.method} was run with profile {known}, not {used[record.method]}: give another folder "
                    "for the run"
                )

    def run_peers(self, python: Path, request: PressRequest, progress: Progress, *, own_settings: bool = False) -> None:
        """Run kvpress presses on the same cases; those that fail are counted by name. `own_settings`: as for `run`."""
        shared = {"seed": self._config.seed, "versions": {**self._versions, "prefill": "exact"}}
        for fraction, failure in add_presses(
            python, request, self.cases, self.log, self._tokenizer, shared, own_settings
        ):
            progress("peers", fraction)
            if failure is None:
                self.counts.records += 1
            else:
                self.counts.peer_failures.append(failure)


def _by_document(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases that follow one another and ask of the same document; others alone."""
    for document, group in itertools.groupby(cases, lambda case: case.prompt.document):
        asked = list(group)
        yield from [asked] if document else ([case] for case in asked)


def _sliced(examples: Sequence[Example], rows: slice) -> list[Example]:
    """Of each subset, the chosen rows."""
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    return [example for own in by_task.values() for example in own[rows]]


def parse_rows(text: str) -> tuple[int | None, int | None, int | None]:
    """'1::2' as the three parts of a slice; '' is all, '3' the first three.

    Raises:
        ConfigError: not a slice of whole numbers, a step of 0, or a slice that is always empty.
    """
    parts = [part.strip() for part in text.split(":")] if ":" in text else ["", text.strip(), ""]
    try:
        start, stop, step = (int(part) if part else None for part in [*parts, ""][:3])
        if len(parts) > 3 or step == 0:
            raise ValueError
    except ValueError:
        raise ConfigError("is not START:STOP:STEP, such as 1::2 or :10", option="rows", value=text) from None
    if not any(range(count)[start:stop:step] for count in (*range(1, 1000), sys.maxsize)):
        raise ConfigError("is no case of any subset: :10 is the first ten", option="rows", value=text)
    return start, stop, step


def _named(model: PreTrainedModel) -> dict[str, str]:
    """What a record names beside its figures."""
    return {
        **versions(),
        "model": Path(model.config._name_or_path).name,
        "dtype": weights_dtype(model),
    }
