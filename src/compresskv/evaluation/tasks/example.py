"""One case of a benchmark."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """A prompt with its right answers. The prompt is `prefix + context + suffix`."""

    task: str
    """Where it belongs in tables: 'needle/single', 'longbench/hotpotqa', 'babilong/qa1-2k'."""
    id: str
    """Unique within `task`, and the same in every run."""
    prefix: str
    """Instructions before the document; may be empty."""
    context: str
    """The document: what a query-agnostic method compresses."""
    suffix: str
    """What follows the document: the question and the form of the answer; may be empty."""
    answers: tuple[str, ...]
    """Right answers; a metric takes the best match unless the benchmark says otherwise."""
    max_new_tokens: int
    chat: bool = True
    """Whether the prompt is put into the model's chat template, where it has one."""
    evidence: tuple[tuple[int, int], ...] = ()
    """(start, end) characters of `prompt` that hold the answer; empty where not known."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What reports group by, JSON values only: length, depth, answer classes."""

    @property
    def prompt(self) -> str:
        """The whole text, before any chat template."""
        return self.prefix + self.context + self.suffix
