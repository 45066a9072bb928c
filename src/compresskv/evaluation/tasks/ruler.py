"""RULER (Hsieh et al., arXiv 2404.06654): its synthetic puzzles, of any length."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from compresskv.calibration.haystack import read_haystack
from compresskv.errors import ConfigError
from compresskv.evaluation.ruler.chain import Chain
from compresskv.evaluation.ruler.counting import CommonWords, FrequentWords
from compresskv.evaluation.ruler.magic import Kind, Magic
from compresskv.evaluation.ruler.puzzle import Puzzle
from compresskv.evaluation.tasks.base import Task, TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.registry import register_task

_MAGIC = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", values="uuids"),
    "niah_multikey_1": Kind("essay", num_keys=4),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Kind("essay", num_values=4),
    "niah_multiquery": Kind("essay", num_keys=4, num_asked=4),
}
_OTHERS: Mapping[str, Callable[[random.Random, int], Puzzle]] = {
    "variable_tracking": lambda draw, _: Chain(draw),
    "common_words": CommonWords,
    "frequent_words": FrequentWords,
}


@register_task
class RulerTask(Task):
    """RULER's eleven synthetic puzzles. Its two of questions on paragraphs need data and are not among them.

    Differs from RULER: the whole prompt, the beginning of the answer included, is the user's text where the model has a
    chat template; essays are the haystack's; words are from a list of our own.
    """

    name = "ruler"
    summary = "RULER's needles, variable tracking and word counts, of any length"
    default_subsets = (*_MAGIC, *_OTHERS)
    metrics: ClassVar[dict[str, str]] = {"score": "share of the answers that occur in the prediction, case aside"}

    def examples(self, settings: TaskSettings) -> list[Example]:
        """For each subset and length, in this order, `limit` cases, or one.

        Raises:
            DataError: the haystack cannot be read.
            ConfigError: an unknown subset, or a length too short for a puzzle.
        """
        subsets = self.chosen_subsets(settings)
        essays = any(subset in _MAGIC and _MAGIC[subset].haystack == "essay" for subset in subsets)
        sentences = read_haystack(settings.haystack) if essays else []
        return [
            _example(settings, subset, length, number, sentences)
            for subset in subsets
            for length in dict.fromkeys(settings.lengths)
            for number in range(settings.limit or 1)
        ]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """RULER's `string_match_all`: the share of the answers that the prediction holds, as parts of words too."""
        found = [answer.lower() in prediction.lower() for answer in example.answers]
        return {"score": sum(found) / len(found)}


def _example(settings: TaskSettings, subset: str, length: int, number: int, sentences: Sequence[str]) -> Example:
    draw = random.Random(repr((settings.seed, subset, length, number)))
    puzzle = Magic(draw, _MAGIC[subset], sentences) if subset in _MAGIC else _OTHERS[subset](draw, length)
    try:
        context = puzzle.longest(settings.tokenizer, length)
    except ConfigError as error:
        problem = f"leaves no room for text beside what {subset} hides in it"
        raise ConfigError(problem, option="lengths", value=length) from error
    starts = [len(puzzle.prefix) + context.index(line) for line in puzzle.evidence]
    return Example(
        task=f"{RulerTask.name}/{subset}",
        id=f"{length}-{number}",
        prefix=puzzle.prefix,
        context=context,
        suffix=puzzle.suffix,
        answers=puzzle.answers,
        max_new_tokens=puzzle.max_new_tokens,
        evidence=tuple((start, start + len(line)) for start, line in zip(starts, puzzle.evidence, strict=True)),
        meta={"length": length},
    )
