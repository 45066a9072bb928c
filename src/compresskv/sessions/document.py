"""What is known of a document that was read: one object, so that whoever takes it has parts that fit together."""

import threading
from dataclasses import dataclass, field

from compresskv.cache.cache import CompressedCache
from compresskv.prompts.turns import Ending
from compresskv.sessions.facts import Facts


@dataclass(frozen=True)
class Document:
    """A document as far as it was read. One that grew is another."""

    cache: CompressedCache
    token_ids: list[int]
    """Of the chat head and the document, as they were read."""
    ending: Ending
    """What a question goes on from."""
    facts: Facts
    laid_out: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False, kw_only=True)
    """Held while the cache's tensors are made anew, with room for a question, or are read by whoever did not ask first:
    such a one must not see half of that."""


@dataclass(frozen=True)
class Lent(Document):
    """A document that is asked: it does not grow meanwhile, or what grew is another."""

    alone: bool
    """Whether nobody else asks it now."""

    def branch(self, room: int) -> CompressedCache:
        """What goes on from it for `room` tokens: in its own tensors, or with copies where others ask it."""
        with self.laid_out:
            return self.cache.branch(room if self.alone else None)
