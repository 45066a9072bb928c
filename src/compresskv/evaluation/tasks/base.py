"""What a benchmark is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from compresskv.errors import ConfigError
from compresskv.evaluation.tasks.example import Example
from compresskv.system.check import suggestion


@dataclass(frozen=True)
class TaskSettings:
    """What a task may be told. Each task reads what concerns it."""

    tokenizer: PreTrainedTokenizerBase
    data: Path | None = None
    """Folder with data files: DATA/longbench, DATA/babilong, or the task's own files in DATA itself."""
    haystack: tuple[Path, ...] = ()
    """Text files or folders to hide needles in; empty: Python's own help topics."""
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Prompt lengths in tokens, for tasks that make their own prompts."""
    depths: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    """Where evidence is hidden, in per cent of the document."""
    subsets: tuple[str, ...] = ()
    """Only these subsets ('hotpotqa', 'qa1-2k', 'single'); empty: all."""
    limit: int | None = None
    """At most this many examples a subset, the first ones."""
    seed: int = 0


def check_depths(depths: Sequence[float]) -> None:
    """Refuse what is no percentage.

    Raises:
        ConfigError: naming the first.
    """
    for depth in depths:
        if not 0 <= depth <= 100:  # NaN, too, fails this
            raise ConfigError("is no percentage: choose from 0 to 100", option="depths", value=depth)


class Task(ABC):
    """A benchmark: where its cases come from and how an answer is scored. One file each."""

    name: ClassVar[str]
    summary: ClassVar[str]
    default_subsets: ClassVar[tuple[str, ...]]
    needs: ClassVar[str] = ""
    """What the folder of data must hold, and where to get it; empty: the task makes its cases itself."""
    setting: ClassVar[str] = "aware"
    """Whether caches are cut with the question in the prompt unless asked otherwise, or 'agnostic': before it comes."""
    metrics: ClassVar[Mapping[str, str]]
    """Metric name -> what it is, for reports; 'score' is the one that tables show."""

    @abstractmethod
    def examples(self, settings: TaskSettings) -> list[Example]:
        """The cases, in a fixed order.

        Raises:
            DataError: a file is missing or malformed; the message names file and line.
            ConfigError: an unknown subset.
        """

    @abstractmethod
    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Metrics of one answer, each in 0..1; always with 'score'. An empty answer scores 0."""

    def chosen_subsets(self, settings: TaskSettings) -> tuple[str, ...]:
        """The subsets to run.

        Raises:
            ConfigError: one is unknown.
        """
        for subset in settings.subsets:
            if subset not in self.default_subsets:
                raise ConfigError(
                    f"task {self.name!r} has no subset {subset!r}{suggestion(subset, self.default_subsets)}"
                )
        return settings.subsets or self.default_subsets
