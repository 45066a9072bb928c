"""A prompt that was read, what that cost, and its continuation token by token."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from compresskv.system import memory
from compresskv.system.clock import now


@dataclass(frozen=True)
class Prefill:
    """What it cost to read one prompt. Seconds end in `_s`, bytes are `nbytes`."""

    prompt_tokens: int
    held_tokens: float
    """Stored per KV head after eviction, masked ones included: a mean over layers and heads."""
    prefill_s: float
    """Reading the prompt, eviction included."""
    scoring_s: float | None
    """Within the prefill: scores of tokens, and budgets that scores decide. None where it cannot be told."""
    eviction_s: float
    """Within the prefill: scoring, selecting, and moving what stays."""
    num_scorings: int | None
    """How often a method was asked to score; 0 proves that nothing was."""
    first_token_s: float
    """From the start of the prefill to the first token."""
    kv_nbytes: int
    """Of the storages really held after eviction."""
    peak_nbytes: int | None = None
    """Growth of the process's memory (on a GPU the allocator's) while the prompt was read; None: not measurable."""


class Continuation:
    """A cache after its prompt, which can go on by itself while other sessions of the model do, too."""

    def __init__(
        self,
        prefill: Prefill,
        first: int,
        advance: Callable[[int], int],
        open_context: Callable[[], AbstractContextManager[Any]],
        not_compiled: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Keep the state.

        Args:
            first: the first generated token.
            advance: feeds a token to the model and returns the next.
            open_context: what must be entered while the model works on this cache.
            not_compiled: why steps are not compiled though that was asked for.
        """
        self.prefill = prefill
        self.tokens = [first]
        """Generated so far."""
        self._advance = advance
        self._open_context = open_context
        self.not_compiled = not_compiled

    def decode(self, num_tokens: int, *devices: torch.device) -> list[float]:
        """Generate more tokens greedily; seconds of each step."""
        seconds = []
        with self._open_context():
            for _ in range(num_tokens):
                start = now(*devices)
                self.tokens.append(self._advance(self.tokens[-1]))
                seconds.append(now(*devices) - start)
        return seconds


class PeakGrowth:
    """How far memory grows above what is held when a `with` begins."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.nbytes: int | None = None
        """None until the `with` has ended, and where the system cannot tell."""

    def __enter__(self) -> "PeakGrowth":
        memory.release(self._device)
        self._works = memory.reset_peak(self._device)
        self._before = memory.peak_nbytes(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._works:
            self.nbytes = max(0, memory.peak_nbytes(self._device) - self._before)
