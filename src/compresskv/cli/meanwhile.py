"""What is held while a prompt is read, as commands are told it and as they tell it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from compresskv import defaults
from compresskv.cli.request import Checked
from compresskv.cli.terminal import counted
from compresskv.cli.typed import as_typed
from compresskv.selection.cuts import CHUNK_TOKENS, ChunkStats
from compresskv.selection.precision import NATIVE

if TYPE_CHECKING:
    from compresskv.cache.candidates import CandidateStats
    from compresskv.methods.base import Method


_USUAL = {
    "chunk_budget": None,
    "chunk_tokens": CHUNK_TOKENS,
    "candidates": defaults.CANDIDATES,
    "store": NATIVE,
}


def held_by(method: "Method", checked: Checked, asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked for, as it is for one method: what others are compared with, and keeps all, is read as ever."""
    if method.evicts or method is checked.methods[0]:
        return dict(asked)
    return {name: _USUAL.get(name, value) for name, value in asked.items()}


def told_held(chunks: ChunkStats | None, candidates: "CandidateStats | None") -> str:
    """What follows what was kept: what was held before, where that was not all and was asked for."""
    told = ""
    if chunks is not None and chunks.num_cuts:
        told += f"; cut {counted(chunks.num_cuts, 'time')} while it was read, at most {chunks.most_held:,} held at once"
    if candidates is not None and candidates.most_held is not None and candidates.factor != defaults.CANDIDATES:
        layers = counted(candidates.num_layers, "layer")
        told += f"; {layers} held at most {candidates.most_held:,} candidates until all were read"
    return told


def told_end(max_new_tokens: int, methods: Iterable[str] = ()) -> str:
    """That an answer was longer.

    Args:
        methods: whose, where several are told of.
    """
    whose = ", ".join(methods)
    return f"[{whose}{': ' if whose else ''}the answer ends at --max-new-tokens {max_new_tokens}]"


def told_notes(notes: Iterable[str], method: str | None = None) -> list[str]:
    """What was asked for and came to nothing, a line each.

    Args:
        method: whose notes they are, where several are told of.
    """
    whose = "" if method is None else f"{method}: "
    return [f"[{whose}{as_typed(note)}]" for note in notes]
