"""Instructions at the beginning of a long prompt, which eviction may lose (after arXiv 2510.00231)."""

import random
from collections.abc import Mapping
from typing import ClassVar

from compresskv.calibration.haystack import Haystack, read_haystack
from compresskv.errors import ConfigError
from compresskv.evaluation.tasks.base import Task, TaskSettings
from compresskv.evaluation.tasks.example import Example
from compresskv.evaluation.tasks.metrics import contains
from compresskv.evaluation.tasks.registry import register_task
from compresskv.evaluation.tasks.rules import Rule, draw_rules
from compresskv.prompts.template import encode_message

_NUM_RULES = 5
_MAX_NEW_TOKENS = {"followed": 64, "repeated": 96}
_BEFORE = "Whatever you are asked, your answer must follow these rules:\n{rules}\n\nText:\n"
_QUESTIONS = {
    "followed": "\n\nQuestion: What is the text about? Answer in one sentence.",
    "repeated": "\n\nQuestion: Which rules must your answers follow? Repeat all five.",
}


@register_task
class InstructionsTask(Task):
    """Whether an answer follows the five rules that the prompt begins with, long before the question.

    Small models follow few of them with the full cache. 'repeated' asks for the rules themselves.

    Differs from the paper: the rules begin the user's turn, since not every chat template has a system's turn.
    """

    name = "instructions"
    summary = "five rules for the answer at the beginning of a long prompt, checked by code"
    default_subsets = tuple(_QUESTIONS)
    metrics: ClassVar[Mapping[str, str]] = {
        "score": "share of the rules that the answer follows or, where it is to repeat them, whose key words it holds",
        "exact_match": "1 where that is all of them, else 0",
    }

    def examples(self, settings: TaskSettings) -> list[Example]:
        """For each subset and length, in this order, `limit` cases, or one.

        Raises:
            DataError: the haystack cannot be read, or is shorter than a length.
            ConfigError: an unknown subset, or a length too short.
        """
        subsets = self.chosen_subsets(settings)
        haystack = Haystack(settings.tokenizer, read_haystack(settings.haystack))
        return [
            _example(settings, haystack, subset, length, number)
            for subset in subsets
            for length in dict.fromkeys(settings.lengths)
            for number in range(settings.limit or 1)
        ]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """How many of the rules are followed, or repeated."""
        if example.task == f"{self.name}/repeated":
            found = [contains(prediction, value) for value in example.answers]
        else:
            found = [float(Rule(**rule).followed(prediction)) for rule in example.meta["rules"]]
        return {"score": sum(found) / len(found), "exact_match": min(found)}


def _example(settings: TaskSettings, haystack: Haystack, subset: str, length: int, number: int) -> Example:
    draw = random.Random(repr((settings.seed, subset, length, number)))
    rules = draw_rules(draw, _NUM_RULES)
    prefix = _BEFORE.format(rules="\n".join(f"{at}. {rule.text}" for at, rule in enumerate(rules, 1)))
    message = encode_message(settings.tokenizer, f"{prefix}.{_QUESTIONS[subset]}")
    reserved = len(message.input_ids) + _MAX_NEW_TOKENS[subset]
    try:
        document = haystack.document(length, draw.randrange(10**6), [], [], reserved)
    except ConfigError as error:
        problem = "leaves no room for text beside the instructions, the question and the answer"
        raise ConfigError(problem, option="lengths", value=length) from error
    starts = [prefix.index(rule.text) for rule in rules]
    return Example(
        task=f"{InstructionsTask.name}/{subset}",
        id=f"{length}-{number}",
        prefix=prefix,
        context=document.text,
        suffix=_QUESTIONS[subset],
        answers=tuple(rule.value for rule in rules),
        max_new_tokens=_MAX_NEW_TOKENS[subset],
        evidence=tuple((start, start + len(rule.text)) for start, rule in zip(starts, rules, strict=True)),
        meta={"length": length, "rules": [vars(rule) for rule in rules]},
    )
