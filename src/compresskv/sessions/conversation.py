"""Turns that follow one another behind a document, and are forgotten from the oldest on."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from compresskv.answer import Generation
from compresskv.cache.cache import CompressedCache
from compresskv.selection.select import EMPTY_SLOT
from compresskv.sessions.facts import Facts
from compresskv.sessions.turn import Turn

TURNS_BUDGET = 1024
"""Tokens of turns that are kept beside the document's."""


@dataclass
class Conversation:
    """What was said so far, on a cache of its own."""

    cache: CompressedCache
    facts: Facts
    """Of the document, whose tokens are never forgotten."""
    turns: list[Turn] = field(default_factory=list)
    """Those that are kept."""
    answer: list[int] = field(default_factory=list)
    """The last answer's tokens, of which all but the last were read."""
    lease: ExitStack = field(default_factory=ExitStack)
    """What is held while it writes into the document's own tensors."""

    @property
    def num_kept(self) -> int:
        """Tokens of turns that are held."""
        return self.cache.get_seq_length() - self.turns[0].start if self.turns else 0

    def note(self, start: int, question: str, answer: Generation) -> None:
        """A turn was said, whose tokens begin at `start`."""
        number = self.turns[-1].number + 1 if self.turns else 1
        turn = Turn(number, start, question=question.strip(), answer=answer.answer)
        self.turns.append(turn.ending_at(self.cache.get_seq_length()))
        self.answer = answer.token_ids

    def forget_oldest(self, budget: int) -> None:
        """Where turns hold more than `budget` tokens, forget the oldest until half of that is left.

        The last turn stays or, where it alone is longer than the budget, its last `budget` tokens.
        """
        if self.num_kept <= budget:
            return
        seen = self.cache.get_seq_length()
        later = [turn for turn in self.turns[1:] if seen - turn.start <= budget // 2] or self.turns[-1:]
        first = max(later[0].start, seen - budget)
        self.turns = [later[0].beginning_at(first), *later[1:]]
        for layer in self.cache.compressed_layers:
            assert layer.store is not None
            held = layer.store.positions
            stays = (held < self.facts.num_tokens) | (held >= first)
            tokens = torch.where(stays, held, EMPTY_SLOT).sort(dim=-1).values
            layer.retain(tokens[..., int((tokens == EMPTY_SLOT).sum(dim=-1).min()) :])
        self.lease.close()  # what is kept is in tensors of its own now
