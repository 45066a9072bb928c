"""Turns that follow one another behind a document, and are forgotten from the oldest on."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from compresskv.cache.cache import CompressedCache
from compresskv.selection.select import EMPTY_SLOT
from compresskv.sessions.facts import Facts

TURNS_BUDGET = 1024
"""Tokens of turns that are kept beside the document's."""


@dataclass
class Conversation:
    """What was said so far, on a cache of its own."""

    cache: CompressedCache
    facts: Facts
    """Of the document, whose tokens are never forgotten."""
    starts: list[int] = field(default_factory=list)
    """Where each turn that is kept begins, in tokens seen."""
    answer: list[int] = field(default_factory=list)
    """The last answer's tokens, of which all but the last were read."""
    lease: ExitStack = field(default_factory=ExitStack)
    """What is held while it writes into the document's own tensors."""

    @property
    def num_kept(self) -> int:
        """Tokens of turns that are held."""
        return self.cache.get_seq_length() - self.starts[0] if self.starts else 0

    def forget_oldest(self, budget: int) -> None:
        """Where turns hold more than `budget` tokens, forget the oldest until half of that is left.

        The last turn stays or, where it alone is longer than the budget, its last `budget` tokens.
        """
        if self.num_kept <= budget:
            return
        seen = self.cache.get_seq_length()
        later = [start for start in self.starts[1:] if seen - start <= budget // 2] or self.starts[-1:]
        first = max(later[0], seen - budget)
        self.starts = [first, *later[1:]]
        for layer in self.cache.compressed_layers:
            assert layer.store is not None
            held = layer.store.positions
            stays = (held < self.facts.num_tokens) | (held >= first)
            tokens = torch.where(stays, held, EMPTY_SLOT).sort(dim=-1).values
            layer.retain(tokens[..., int((tokens == EMPTY_SLOT).sum(dim=-1).min()) :])
        self.lease.close()  # what is kept is in tensors of its own now
