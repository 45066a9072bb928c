"""Needles in a haystack: what is hidden at a known place in a long text, and asked for.

Four subsets: 'single' hides a plain fact between the sentences of the haystack and asks for it in its own words,
'paraphrase' a sentence whose question shares no word with it, 'multi' several facts, and 'uuid' one pair of random keys
and values between other such pairs. The needles are others than those that profiles are calibrated with.

What a case holds depends on the seed and on its own place in the grid, never on the rest of the grid: the same id is
the same case, whatever other lengths and depths are run.
"""

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compresskv.calibration.haystack import Haystack, read_haystack
from compresskv.calibration.needles import Needle, read_needles
from compresskv.calibration.recall import rouge_1_recall
from compresskv.errors import ConfigError
from compresskv.evaluation.tasks.base import Task, TaskSettings, check_depths
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.key_values import draw_pair, hide_pair
from compresskv.evaluation.tasks.metrics import contains
from compresskv.evaluation.tasks.registry import register_task
from compresskv.prompts.template import encode_message
from compresskv.system.inputs import read_json

NEEDLES = Path(__file__).parent.parent / "needles.json"
_NUM_NEEDLES = {"single": 1, "paraphrase": 1, "multi": 3}
_KINDS = {"single": "fact", "paraphrase": "paraphrase", "multi": "fact"}
_MAX_NEW_TOKENS = {"single": 32, "paraphrase": 32, "multi": 96, "uuid": 48}
_BREAK = "\n\n"  # between the document and the question
_SINGLE_QUESTION = "{} Answer in one sentence."
_MULTI_QUESTION = "Answer these questions in one numbered list, one sentence each.\n{}"
_UUID_QUESTION = 'Each line above holds a key and its value. What is the value of the key "{}"? Answer with it alone.'


@dataclass(frozen=True)
class Fact(Needle):
    """A needle with the words that a right answer must hold."""

    answer: str


def evaluation_facts() -> list[Fact]:
    """The needles to evaluate with."""
    rows = read_json(NEEDLES)["needles"]
    answers = {row["id"]: row["answer"] for row in rows}
    return [Fact(**vars(needle), answer=answers[needle.id]) for needle in read_needles(NEEDLES)]


@dataclass(frozen=True)
class _Place:
    """A place in the grid."""

    seed: int
    subset: str
    length: int
    depth: float
    number: int

    @property
    def id(self) -> str:
        return f"{self.length}-{self.depth:g}-{self.number}"

    def facts(self, facts: list[Fact]) -> list[Fact]:
        """Other needles for each number and, as far as they last, for each depth."""
        count = _NUM_NEEDLES[self.subset]
        own = [fact for fact in facts if fact.kind == _KINDS[self.subset]]
        order = random.Random(f"{self.seed} {self.subset} {self.length}").sample(own, len(own))
        # The last fifth is for the further numbers of depth 100, which would else meet those of depth 0.
        first = round(self.depth / 100 * len(order) * 4 / 5) + self.number * count
        return [order[(first + step) % len(order)] for step in range(count)]

    @property
    def rotation(self) -> int:
        """Of the haystack: successive numbers get successive ones, so that they begin at other sentences."""
        return self._draw().randrange(10**6) + self.number

    def generator(self) -> random.Random:
        """What random keys and values are drawn from."""
        return self._draw(self.number)

    def _draw(self, *more: int) -> random.Random:
        return random.Random(repr((self.seed, self.subset, self.length, float(self.depth), *more)))


@register_task
class NeedleTask(Task):
    """Retrieval from known places in texts of known lengths."""

    name = "needle"
    summary = "sentences or key-value pairs hidden at set depths in texts of set lengths"
    default_subsets = ("single", "paraphrase", "multi", "uuid")
    metrics: ClassVar[Mapping[str, str]] = {
        "score": "share of the key answers that stand word for word in the prediction",
        "exact_match": "1 where every key answer stands word for word in the prediction, else 0",
        "rouge_1_recall": "share of the hidden text's words that the prediction repeats (ROUGE-1 recall)",
    }

    def examples(self, settings: TaskSettings) -> list[Example]:
        """For each subset, length and depth, in this order, `limit` cases, or one.

        Raises:
            DataError: the haystack cannot be read, or is shorter than a length.
            ConfigError: an unknown subset, a depth that is no percentage, a length too short for what is hidden.
        """
        hider = _Hider(settings)
        return [hider.example(place) for place in _grid(settings, self.chosen_subsets(settings))]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """How many key answers were found; a value of 'uuid' counts only letter for letter."""
        if example.task == f"{self.name}/uuid":
            found = [float(answer in prediction) for answer in example.answers]
        else:
            found = [contains(prediction, answer) for answer in example.answers]
        return {
            "score": sum(found) / len(found),
            "exact_match": min(found),
            "rouge_1_recall": rouge_1_recall(prediction, example.meta["reference"]),
        }


def _grid(settings: TaskSettings, subsets: tuple[str, ...]) -> list[_Place]:
    check_depths(settings.depths)
    return [
        _Place(settings.seed, subset, length, depth, number)
        for subset in dict.fromkeys(subsets)
        for length in dict.fromkeys(settings.lengths)
        for depth in dict.fromkeys(settings.depths)
        for number in range(settings.limit or 1)
    ]


class _Hider:
    """Makes the examples of places."""

    def __init__(self, settings: TaskSettings) -> None:
        self._tokenizer = settings.tokenizer
        self._haystack_paths = settings.haystack
        self._facts = evaluation_facts()

    @functools.cached_property
    def _haystack(self) -> Haystack:
        """Read and tokenized once, and only where a subset hides sentences."""
        return Haystack(self._tokenizer, read_haystack(self._haystack_paths))

    def example(self, place: _Place) -> Example:
        try:
            return self._pair(place) if place.subset == "uuid" else self._sentences(place)
        except ConfigError as error:
            problem = (
                "leaves no room for text beside what is hidden in it, the question and the answer of "
                f"needle/{place.subset}: choose a longer one"
            )
            raise ConfigError(problem, option="lengths", value=place.length) from error

    def _sentences(self, place: _Place) -> Example:
        facts = place.facts(self._facts)
        if len(facts) == 1:
            question = _SINGLE_QUESTION.format(facts[0].question)
        else:
            numbered = (f"{number}. {fact.question}" for number, fact in enumerate(facts, 1))
            question = _MULTI_QUESTION.format("\n".join(numbered))
        # One stands at the place's depth, the others follow evenly, from the end on to the beginning.
        depths = [(place.depth + step * 100 / len(facts)) % 100 for step in range(1, len(facts))]
        text = self._haystack.document(
            place.length, place.rotation, [place.depth, *depths], list(facts), self._reserved(place, question)
        ).text
        kinds = {fact.kind for fact in facts}
        kind = kinds.pop() if len(kinds) == 1 else "mixed"
        return _example(place, text, question, [(fact.needle, fact.answer) for fact in facts], kind)

    def _pair(self, place: _Place) -> Example:
        draw = place.generator()
        pair = draw_pair(draw)
        question = _UUID_QUESTION.format(pair.key)
        num_tokens = place.length - self._reserved(place, question)
        text = hide_pair(self._tokenizer, pair, depth=place.depth, num_tokens=num_tokens, draw=draw)
        return _example(place, text, question, [(pair.line, pair.value)], "uuid")

    def _reserved(self, place: _Place, question: str) -> int:
        """Tokens of the chat template, of what follows the document, and of the answer."""
        message = encode_message(self._tokenizer, f".{_BREAK}{question}")
        return len(message.input_ids) + _MAX_NEW_TOKENS[place.subset]


def _example(place: _Place, text: str, question: str, hidden: list[tuple[str, str]], kind: str) -> Example:
    """`hidden` holds (what stands in the text, its key answer), in the order of the questions."""
    starts = [text.index(what) for what, _ in hidden]
    return Example(
        task=f"needle/{place.subset}",
        id=place.id,
        prefix="",
        context=text,
        suffix=f"{_BREAK}{question}",
        answers=tuple(answer for _, answer in hidden),
        max_new_tokens=_MAX_NEW_TOKENS[place.subset],
        evidence=tuple((start, start + len(what)) for start, (what, _) in zip(starts, hidden, strict=True)),
        meta={
            "length": place.length,
            "depth": place.depth,
            "kind": kind,
            "reference": " ".join(what for what, _ in hidden),
        },
    )
