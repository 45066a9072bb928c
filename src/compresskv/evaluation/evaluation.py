"""A whole evaluation: examples of several tasks, every configuration, records on disk, peers beside them."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.attention.prefill import reads_exactly
from compresskv.errors import DataError, PromptError
from compresskv.evaluation.configurations import FULL, Configuration
from compresskv.evaluation.encode import encode
from compresskv.evaluation.method_runner import Case, Runner
from compresskv.evaluation.press_records import add_presses
from compresskv.evaluation.press_request import PressRequest
from compresskv.evaluation.run_folder import RecordLog
from compresskv.evaluation.run_options import RunOptions
from compresskv.evaluation.tasks.base import Task
from compresskv.evaluation.tasks.example import Example
from compresskv.models.fingerprint import fingerprint
from compresskv.models.quantize import weights_dtype
from compresskv.prompts.prompt import room_for_prompt
from compresskv.system.libraries import versions
from compresskv.system.progress import Progress


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
        options: RunOptions,
        folder: Path,
    ) -> None:
        """Open or resume a run.

        Raises:
            DataError: the folder holds a run of other options or another model, or cannot be used.
            DataError, ConfigError: as the tasks raise them. The folder is not touched then.
            PromptError: a prompt cannot be cut to the limit.
        """
        self._model, self._tokenizer, self._options = model, tokenizer, options
        named, exact = _named(model), reads_exactly(model.device, model.dtype, options.exact_prefill)
        self._versions = {**named, "prefill": "exact" if exact else "fast"}
        begun_with = {
            **options.to_dict(),
            **named,
            "exact_prefill": exact,
            "device": model.device.type,
            "weights": str(fingerprint(model)),
        }
        self.counts = Counts()
        self.cases = self._encoded()
        """The prompts of all tasks."""
        self.log = RecordLog(folder, begun_with)

    def __exit__(self, *_: object) -> None:
        self.log.close()

    def _encoded(self) -> list[Case]:
        """Prompts that are too long are cut or left out, and counted."""
        cases = []
        for task, subsets in self._options.chosen_tasks():
            examples = task.examples(self._options.task_settings(self._tokenizer, subsets))
            for example in _sliced(examples, slice(*self._options.rows)):
                case = self._case(task, example)
                if case is None:
                    self.counts.skipped += 1
                else:
                    self.counts.truncated += case.prompt.num_truncated > 0
                    cases.append(case)
        if not cases and not self.counts.skipped:
            given = ":".join("" if part is None else str(part) for part in self._options.rows)
            limit = self._options.limit
            of = "" if limit is None else f" among the first {limit}, which is the limit"
            raise DataError(f"leaves no case: no subset has so many{of}", option="rows", value=given)
        self.counts.examples = len(cases)
        return cases

    def _case(self, task: Task, example: Example) -> Case | None:
        """None where the prompt is to be left out."""
        skips = self._options.too_long == "skip"
        wanted = min(example.max_new_tokens, self._options.max_new_tokens or example.max_new_tokens)
        limits = [room_for_prompt(self._model, wanted), self._options.max_prompt_tokens]
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
        options = self._options
        runner = Runner(
            self._model, self._tokenizer, options.seed, options.answers, self._versions, options.exact_prefill
        )
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
        shared = {"seed": self._options.seed, "versions": {**self._versions, "prefill": "exact"}}
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


def _named(model: PreTrainedModel) -> dict[str, str]:
    """What a record names beside its figures."""
    return {
        **versions(),
        "model": Path(model.config._name_or_path).name,
        "dtype": weights_dtype(model),
    }
