"""What a run is begun with, and keeps to: tasks, cases, limits."""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresskv.calibration.haystack import read_haystack
from compresskv.errors import ConfigError, DataError
from compresskv.evaluation.run_folder import check_run
from compresskv.evaluation.tasks.base import Task, TaskSettings, check_depths
from compresskv.evaluation.tasks.jsonl import task_folder
from compresskv.evaluation.tasks.registry import create_task
from compresskv.system.check import check_known, check_least
from compresskv.system.libraries import versions
from compresskv.system.paths import exists, is_folder, why_unseen

TOO_LONG = ("cut", "skip")


@dataclass(frozen=True)
class RunOptions:
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
