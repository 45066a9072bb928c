"""Rules for an answer that code can check."""

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from compresskv.evaluation.ruler.words import ADJECTIVES, NOUNS

_FRAME = string.whitespace + string.punctuation
_LETTERS = {"capital": str.isupper, "small": str.islower}


@dataclass(frozen=True)
class Rule:
    """What an answer must do, in words and as code."""

    kind: str
    text: str
    """A sentence."""
    value: str
    """Those of its words that tell it from others of its kind."""

    def followed(self, answer: str) -> bool:
        """Whether an answer follows it, which an empty one does not; case counts where it is asked for."""
        return _CHECKS[self.kind](answer.lower() if self.kind != "letters" else answer, self.value)


def _begins(answer: str, word: str) -> bool:
    return re.match(rf"{re.escape(word)}\b", answer.lstrip(_FRAME)) is not None


def _ends(answer: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}$", answer.rstrip(_FRAME)) is not None


def _mentions(answer: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", answer) is not None


def _letters(answer: str, kind: str) -> bool:
    return _LETTERS[kind](answer)


def _brackets(answer: str, _: str) -> bool:
    return re.fullmatch(r"\[[^\[\]]+\]", answer.strip()) is not None


_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "begins": _begins,
    "ends": _ends,
    "mentions": _mentions,
    "number": _mentions,
    "signed": _mentions,
    "letters": _letters,
    "brackets": _brackets,
}
_TEXTS = {
    "begins": 'Begin your answer with the word "{}".',
    "ends": 'End your answer with the words "{}".',
    "mentions": 'Use the word "{}" in your answer.',
    "number": "Give the reference number {} in your answer.",
    "signed": 'Write "Yours, {}" in your answer.',
    "letters": "Write in {} letters only.",
    "brackets": "Put all of your answer in square {}.",
}


def draw_rules(draw: random.Random, count: int) -> list[Rule]:
    """`count` rules of different kinds, which one answer can follow all together, in random order."""
    words = draw.sample(NOUNS, 4)
    values = {
        "begins": words[0],
        "ends": f"{draw.choice(ADJECTIVES)} {words[1]}",
        "mentions": words[2],
        "number": str(draw.randint(1000, 9999)),
        "signed": words[3],
        "letters": draw.choice(list(_LETTERS)),
        "brackets": "brackets",
    }
    kinds = draw.sample(list(_TEXTS), count)
    return [Rule(kind, _TEXTS[kind].format(values[kind]), values[kind].lower()) for kind in kinds]
