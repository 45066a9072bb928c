"""BABILong: bAbI's facts scattered through books (Kuratov et al., arXiv 2406.10149)."""

import re
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from compresskv.evaluation.tasks import metrics
from compresskv.evaluation.tasks.base import Task, TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.jsonl import Line, existing_files, read_lines, task_folder
from compresskv.evaluation.tasks.registry import register_task
from compresskv.system.convert import Text

_LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k")
_TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
_NEEDS = "<length>/qaN.jsonl (1k/qa1.jsonl), rows of input, question and target, as in the hub's RMT-team/babilong"
_PREFIX = (
    "The text below is a book in which short facts are hidden: who went where, and who took, left or gave what. "
    "The facts are in the order in which they happened, so a later one overrules an earlier one. "
    "Answer the question that follows the text from these facts alone. "
    "Answer with one word: the name of the place, the person or the thing that is asked for.\n\nText:\n"
)
_SUFFIX = "\n\nEnd of the text. Answer with one word.\n\nQuestion: {question}\nAnswer:"
_CANDIDATES = (
    frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}),  # qa1 to qa4
    frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),  # qa5
)
"""What a question may have as its answer; an answer that names two of them is a guess."""
_MAX_NEW_TOKENS = 15


class _Row(msgspec.Struct):
    input: Text
    question: Text
    target: Text


@register_task
class BABILong(Task):
    """Questions about one, two or three facts, or a relation, in a text that is about something else."""

    name: ClassVar[str] = "babilong"
    summary: ClassVar[str] = "bAbI's facts hidden in books (qa1 to qa5), from BABILong's data files"
    default_subsets: ClassVar[tuple[str, ...]] = tuple(f"{task}-{length}" for length in _LENGTHS for task in _TASKS)
    needs = _NEEDS
    metrics: ClassVar[Mapping[str, str]] = {
        "score": "BABILong's accuracy: the first sentence names the right answer and no other possible one",
        "contains": "the right answer occurs anywhere",
    }

    def examples(self, settings: TaskSettings) -> list[Example]:
        """The rows of every chosen subset whose file exists; see `Task.examples`."""
        files = {subset: _file_name(subset) for subset in self.chosen_subsets(settings)}
        folder = task_folder(self.name, settings.data, self.needs)
        found = existing_files(folder, files, settings)
        return [
            _example(subset, line)
            for subset, name in found.items()
            for line in read_lines(folder, name, _Row, settings.limit)
        ]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Whether the first sentence gives the right answer, and whether the whole prediction does."""
        sentence = metrics.answer_line(prediction.strip()).split(".")[0]
        return {
            "score": metrics.best_of(
                lambda text, target: _accuracy(text, target, example.suffix), sentence, example.answers
            ),
            "contains": metrics.best_of(metrics.contains, prediction, example.answers),
        }


def _accuracy(sentence: str, target: str, question: str) -> float:
    """Candidates that the question names do not count: an answer may repeat it."""
    target = target.lower()
    for candidates in _CANDIDATES:
        if target in candidates:
            return float(_words(sentence) & (candidates - _words(question) | {target}) == {target})
    return metrics.contains(sentence, target)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))


def _file_name(subset: str) -> str:
    task, length = subset.split("-")
    return f"{length}/{task}.jsonl"


def _example(subset: str, line: Line[_Row]) -> Example:
    row = line.row
    return Example(
        task=f"babilong/{subset}",
        id=str(line.number),
        prefix=_PREFIX,
        context=row.input,
        suffix=_SUFFIX.format(question=row.question.strip()),
        answers=(row.target.strip(),),
        max_new_tokens=_MAX_NEW_TOKENS,
        meta={"length": 1000 * int(subset.split("-")[1].removesuffix("k"))},
    )
