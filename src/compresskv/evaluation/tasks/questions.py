"""Several questions on one document, which is compressed before any of them is known."""

import random
from collections.abc import Mapping
from typing import ClassVar

from compresskv.calibration.haystack import Haystack, read_haystack
from compresskv.calibration.recall import rouge_1_recall
from compresskv.errors import ConfigError
from compresskv.evaluation.tasks.base import Task, TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.metrics import contains
from compresskv.evaluation.tasks.needle import Fact, evaluation_facts
from compresskv.evaluation.tasks.registry import register_task
from compresskv.prompts.template import encode_message

_NUM_QUESTIONS = 5
_MAX_NEW_TOKENS = 32
_KINDS = {"facts": "fact", "paraphrases": "paraphrase"}
_QUESTION = "\n\n{} Answer in one sentence."


@register_task
class QuestionsTask(Task):
    """Five questions on each document, each asked of what is left of it, without the others.

    In the setting 'aware' each question is in the prompt when tokens are chosen.
    """

    name = "questions"
    summary = "five questions on one document, which is compressed before they come"
    default_subsets = tuple(_KINDS)
    setting = "agnostic"
    metrics: ClassVar[Mapping[str, str]] = {
        "score": "whether the key answer stands word for word in the prediction",
        "rouge_1_recall": "share of the hidden sentence's words that the prediction repeats (ROUGE-1 recall)",
    }

    def examples(self, settings: TaskSettings) -> list[Example]:
        """For each subset and length, in this order, the questions on `limit` documents, or on one.

        Raises:
            DataError: the haystack cannot be read, or is shorter than a length.
            ConfigError: an unknown subset, or a length too short for what is hidden.
        """
        subsets = self.chosen_subsets(settings)
        haystack = Haystack(settings.tokenizer, read_haystack(settings.haystack))
        return [
            example
            for subset in subsets
            for length in dict.fromkeys(settings.lengths)
            for number in range(settings.limit or 1)
            for example in _examples(settings, haystack, subset, length, number)
        ]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Whether the key answer was found."""
        return {
            "score": contains(prediction, example.answers[0]),
            "rouge_1_recall": rouge_1_recall(prediction, example.meta["reference"]),
        }


def _examples(settings: TaskSettings, haystack: Haystack, subset: str, length: int, number: int) -> list[Example]:
    """The questions on one document: its facts stand at even distances."""
    draw = random.Random(repr((settings.seed, subset, length)))
    own = [fact for fact in evaluation_facts() if fact.kind == _KINDS[subset]]
    order = draw.sample(own, len(own))
    facts = [order[(number * _NUM_QUESTIONS + step) % len(order)] for step in range(_NUM_QUESTIONS)]
    questions = [_QUESTION.format(fact.question) for fact in facts]
    longest = max(len(encode_message(settings.tokenizer, f".{question}").input_ids) for question in questions)
    depths = [100 * (step + 0.5) / _NUM_QUESTIONS for step in range(_NUM_QUESTIONS)]
    rotation = draw.randrange(10**6) + number
    try:
        text = haystack.document(length, rotation, depths, list(facts), longest + _MAX_NEW_TOKENS).text
    except ConfigError as error:
        problem = f"leaves no room for text beside what is hidden in it, the question and the answer of {subset}"
        raise ConfigError(problem, option="lengths", value=length) from error
    return [
        _example(subset, f"{length}-{number}", at, text, fact, question, length)
        for at, (fact, question) in enumerate(zip(facts, questions, strict=True))
    ]


def _example(subset: str, document: str, at: int, text: str, fact: Fact, question: str, length: int) -> Example:
    start = text.index(fact.needle)
    return Example(
        task=f"{QuestionsTask.name}/{subset}",
        id=f"{document}-{at}",
        prefix="",
        context=text,
        suffix=question,
        answers=(fact.answer,),
        max_new_tokens=_MAX_NEW_TOKENS,
        evidence=((start, start + len(fact.needle)),),
        meta={"length": length, "reference": fact.needle, "document": document},
    )
