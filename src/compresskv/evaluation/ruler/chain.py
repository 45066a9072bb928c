"""Variable tracking: a chain of assignments, each to the variable before, hidden in repeated sentences."""

import random
import string
from dataclasses import dataclass

from compresskv.evaluation.ruler.puzzle import Puzzle

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_TEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
_NUM_HOPS = 4
_SHOT_NOISE = 5  # lines of noise in the solved example that precedes the question


class Chain(Puzzle):
    """One chain of four hops, after one solved example; a document's size is its number of lines of noise."""

    max_new_tokens = 30

    def __init__(self, draw: random.Random) -> None:
        shot = _Assignments.drawn(draw, num_letters=3)
        solved = f"{_TEXT}{shot.hidden(draw, _SHOT_NOISE)}{shot.question} {' '.join(shot.names)}\n\n\n"
        self._chain = _Assignments.drawn(draw, num_letters=5)
        self._state = draw.getstate()
        self.prefix, self.suffix = solved + _TEXT, self._chain.question
        self.answers, self.evidence = self._chain.names, tuple(self._chain.lines)

    def document(self, size: int) -> str:
        """The chain's lines, in order, at random places among `size` lines of noise."""
        draw = random.Random()
        draw.setstate(self._state)
        return self._chain.hidden(draw, size)


@dataclass(frozen=True)
class _Assignments:
    """Variables that all have one value: the first is given it, each other is given the one before."""

    names: tuple[str, ...]
    value: int

    @classmethod
    def drawn(cls, draw: random.Random, num_letters: int) -> "_Assignments":
        names: list[str] = []
        while len(names) <= _NUM_HOPS:
            name = "".join(draw.choices(string.ascii_uppercase, k=num_letters))
            names += [name] if name not in names else []
        return cls(tuple(names), draw.randrange(10000, 99999))

    @property
    def lines(self) -> list[str]:
        given = [str(self.value), *(f"VAR {name}" for name in self.names)]
        return [f"VAR {name} = {what}" for name, what in zip(self.names, given, strict=False)]

    @property
    def question(self) -> str:
        return _QUESTION.format(value=self.value, count=len(self.names))

    def hidden(self, draw: random.Random, num_noise: int) -> str:
        lines = self.lines
        places = set(draw.sample(range(num_noise + len(lines)), len(lines)))
        rest = iter(lines)
        return "\n".join(next(rest) if place in places else NOISE for place in range(num_noise + len(lines)))
