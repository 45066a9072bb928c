"""What transformers' `generate` is reading while a model runs, which it tells neither the model nor its cache."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

_MODULE, _FUNCTION = "transformers.generation.utils", "_prefill"


def chunked_prompt_length() -> int | None:
    """The length of the prompt that `generate` is reading in chunks (`prefill_chunk_size`); None where it is not.

    A chunk looks like a whole prompt, and evicting after the first one would be wrong.
    """
    own = _prefill()
    if own.get("input_ids") is None or getattr(own.get("generation_config"), "prefill_chunk_size", None) is None:
        return None
    return int(own["input_ids"].shape[1])


@dataclass(frozen=True, eq=False)
class GivenPrompt:
    """What `generate` was given when a cache began to read, if it was that."""

    token_ids: Tensor | None = None
    """(B, T), those that a cache has seen included."""

    @classmethod
    def now(cls) -> "GivenPrompt":
        """That which it is reading."""
        return cls(_prefill().get("input_ids"))

    def is_another(self) -> bool:
        """Whether it, which leaves out as many tokens as a cache has seen, is given others now than it was at first."""
        own, given = self.token_ids, self.now().token_ids
        if own is None or given is None or len(own) != len(given):
            return False
        return not torch.equal(own, given[:, : own.shape[1]])


def lacks_what_was_read() -> bool:
    """Whether `generate` cuts what a cache has seen from a prompt that is not longer: it takes it for the same text."""
    num_new = _prefill().get("next_sequence_length")
    return num_new is not None and num_new <= 0


def is_ignored(cache: object) -> bool:
    """Whether the innermost `generate` was given a cache that it is told not to use: it then reads all of its text at
    each step.
    """
    for frame in _frames():
        given = frame.f_locals.get("model_kwargs")
        if isinstance(given, dict):
            return given.get("use_cache") is False and any(value is cache for value in given.values())
    return False


def is_generating() -> bool:
    """Whether `generate` has read its prompt and goes on with what it generated."""
    running = [frame.f_code.co_name for frame in _frames()]
    return bool(running) and _FUNCTION not in running


def _prefill() -> dict[str, Any]:
    """The variables of the call that reads a prompt, somewhere below us on the stack; none where there is no such."""
    return next((frame.f_locals for frame in _frames() if frame.f_code.co_name == _FUNCTION), {})


def _frames() -> Iterator[FrameType]:
    """The calls of `generate` and its parts that are below us on the stack, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _MODULE:
            yield frame
        frame = frame.f_back
