"""What is known of a document that was read: one object, so that whoever takes it has parts that fit together."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Lent(Document):
    """A document that is asked: it does not grow meanwhile, or what grew is another."""

    alone: bool
    """Whether nobody else asks it now."""

    def branch(self, room: int) -> CompressedCache:
        """What goes on from it for `room` tokens: in its own tensors, or with copies where others ask it."""
        return self.cache.branch(room if self.alone else None)
