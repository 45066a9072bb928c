"""Needles: sentences that give a key its magic value, in noise, in essays, or among other such sentences."""

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from compresskv.evaluation.ruler.chain import NOISE
from compresskv.evaluation.ruler.puzzle import Puzzle
from compresskv.evaluation.ruler.words import ADJECTIVES, NOUNS

_TEXT = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {values} afterwards.\n"
)
_QUESTION = "\nWhat are all the special magic {values} for {keys} mentioned in the provided text?"
_ANSWER = " The special magic {values} for {keys} mentioned in the provided text are"
_ONE = (("Some", "A"), ("are all", "is"), ("are", "is"))  # RULER's way of asking for one value
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # per cent of an essay's sentences


@dataclass(frozen=True)
class Kind:
    """What is hidden in what, and how much of it is asked for."""

    haystack: str
    """'noise', 'essay' or 'needles'."""
    keys: str = "words"
    values: str = "numbers"
    """'words', 'numbers' or 'uuids'."""
    num_keys: int = 1
    num_values: int = 1
    """Of each key."""
    num_asked: int = 1
    """Keys that are asked for."""


class Magic(Puzzle):
    """The values of some of the hidden keys; a document's size is its number of sentences beside the needles."""

    max_new_tokens = 128

    def __init__(self, draw: random.Random, kind: Kind, sentences: Sequence[str] = ()) -> None:
        """Draw what is hidden.

        Args:
            sentences: of which an 'essay' is made: from any place on, and over again where they do not last.
        """
        self._kind = kind
        hidden: dict[str, list[str]] = {}
        while len(hidden) < kind.num_keys:
            hidden[_drawn(draw, kind.keys)] = [_drawn(draw, kind.values) for _ in range(kind.num_values)]
        needles = [(key, value) for key, values in hidden.items() for value in values]
        draw.shuffle(needles)
        asked = draw.sample(list(hidden), kind.num_asked)
        self._keys = set(hidden)
        self._needles = [self._needle(key, value) for key, value in needles]
        self.least_size = len(needles)
        self._depths = sorted(draw.sample(_DEPTHS, len(needles)))
        self._seed = draw.getrandbits(64)
        self._sentences = sentences
        self._start = draw.randrange(len(sentences)) if sentences else 0  # last: other haystacks do without
        self.prefix, self.suffix = self._worded(asked)
        self.answers = tuple(value for key in asked for value in hidden[key])
        self.evidence = tuple(self._needle(key, value) for key, value in needles if key in asked)

    def document(self, size: int) -> str:
        """The needles at random places among `size` sentences."""
        if self._kind.haystack == "essay":
            places = [int(size * depth / 100) for depth in self._depths]
            lines = [self._sentences[(self._start + at) % len(self._sentences)] for at in range(size)]
        else:
            places = sorted(random.Random(self._seed).sample(range(size), len(self._needles)))
            lines = [NOISE] * size if self._kind.haystack == "noise" else self._others(size)
        for place, needle in zip(reversed(places), reversed(self._needles), strict=True):
            lines.insert(place, needle)
        return (" " if self._kind.haystack == "essay" else "\n").join(lines)

    def _others(self, size: int) -> list[str]:
        """Needles of other keys."""
        draw, lines = random.Random(self._seed), list[str]()
        while len(lines) < size:
            key, value = _drawn(draw, self._kind.keys), _drawn(draw, self._kind.values)
            if key not in self._keys:
                lines.append(self._needle(key, value))
        return lines

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self._kind.values} for {key} is: {value}."

    def _worded(self, asked: Sequence[str]) -> tuple[str, str]:
        """What stands before and after the document."""
        values, texts = self._kind.values, [_TEXT, _QUESTION, _ANSWER]
        if self._kind.num_asked * self._kind.num_values == 1:
            values = values.removesuffix("s")
            for several, one in _ONE:
                texts = [text.replace(several, one) for text in texts]
        keys = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        before, question, answer = (text.format(values=values, keys=keys) for text in texts)
        return before, question + answer


def _drawn(draw: random.Random, kind: str) -> str:
    if kind == "words":
        return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
    if kind == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))
