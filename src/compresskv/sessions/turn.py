"""What was said in one turn of a conversation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Turn:
    """A question and its answer, beside the tokens that are held of them. Plain values, for JSON."""

    number: int
    """From 1 on; turns that were forgotten count."""
    start: int
    """Where its tokens begin, among those that were seen."""
    num_tokens: int | None = None
    """That are held, an answer's last one among the next turn's; None where an older file does not say."""
    question: str | None = None
    """None, as `answer`, where an older file does not say."""
    answer: str | None = None

    def beginning_at(self, start: int) -> Turn:
        """The same without what was forgotten of it."""
        held = None if self.num_tokens is None else self.num_tokens - (start - self.start)
        return replace(self, start=start, num_tokens=held)

    def ending_at(self, end: int) -> Turn:
        """The same with its tokens counted."""
        return replace(self, num_tokens=end - self.start)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "number": self.number,
            "num_tokens": self.num_tokens,
            "question": self.question,
            "answer": self.answer,
        }


def untold_turns(starts: list[int]) -> tuple[Turn, ...]:
    """Those of a file that tells no more of them than where they begin."""
    turns = [Turn(number, start) for number, start in enumerate(starts, 1)]
    return (*(turn.ending_at(later.start) for turn, later in pairwise(turns)), *turns[-1:])
