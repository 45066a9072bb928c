"""When a cache is cut, by tokens read alone: the same cuts whatever batches and chunks a text is read in."""

from collections.abc import Sequence
from dataclasses import dataclass

from compresskv.errors import ConfigError
from compresskv.selection.budgets import Budget
from compresskv.system.check import check_count

CHUNK_TOKENS = 1024
"""Tokens of a prompt between two cuts, where nothing is said."""
END_TOKENS = 64
"""Tokens of a prompt's end that are read beforehand at each cut in front of it: what the choice is for. As many as the
observation window has, where these are more."""
DECODE_INTERVAL = 128
"""Tokens of an answer between two cuts, where nothing is said."""


@dataclass(frozen=True)
class Cut:
    """What is done when so many tokens were read."""

    num_read: int
    """Of the whole text, the evicted ones included."""
    num_held: int
    """What is chosen among: what an earlier cut kept, and what was read since."""
    num_kept: int

    @property
    def num_lost(self) -> int:
        """Tokens that are gone then, those of earlier cuts included."""
        return self.num_read - self.num_kept


@dataclass(frozen=True)
class Chunks:
    """How a prompt is cut while it is read, so that no more than a part of it is ever held."""

    budget: int
    """Tokens that are kept from chunk to chunk; more where more stay in the end."""
    tokens: int = CHUNK_TOKENS
    """New tokens between two cuts, which are made at multiples of it."""

    def check(self, window_size: int, budget: Budget) -> None:
        """Refuse what is no number of tokens, leaves an observation window no room, or is less than what is to stay.

        Args:
            budget: what stays in the end.
        Raises:
            ConfigError: naming it.
        """
        _check_counts(least_end(window_size), chunk_budget=self.budget, chunk_tokens=self.tokens)
        in_the_end = 0 if isinstance(budget, (float, str)) else budget if isinstance(budget, int) else max(budget)
        if self.budget < in_the_end:
            problem = f"is below budget={in_the_end}: what is to stay in the end must stay before, too"
            raise ConfigError(problem, option="chunk_budget", value=self.budget)


@dataclass(frozen=True)
class ChunkStats:
    """How a prompt was cut while it was read."""

    budget: int
    tokens: int
    """Of a chunk."""
    num_cuts: int
    """Before the prompt's end."""
    num_kept: int
    """Tokens that stayed at each of them in every KV head: the budget, or what the fullest head keeps in the end."""
    most_held: int
    """Tokens that a KV head held at once, without those of the prompt's end that were read beforehand."""
    note: str | None
    """What became of the budget, where it was not followed."""


def chunk_stats(num_prompt: int, num_kept: int, cuts: Sequence[Cut], chunks: Chunks) -> ChunkStats:
    """What is to be told of a prompt's cuts before its end.

    Args:
        num_kept: in the fullest KV head, in the end.
    """
    between, note = max(chunks.budget, num_kept), None
    if not cuts:
        note = (
            f"chunk_budget={chunks.budget} had no effect: where the prompt of {num_prompt:,} tokens could be cut, at "
            f"multiples of chunk_tokens={chunks.tokens} before its end, no more was held than is to stay"
        )
    elif between > chunks.budget:
        note = f"chunk_budget={chunks.budget} was raised to {between:,}, which the fullest KV head keeps in the end"
    return ChunkStats(chunks.budget, chunks.tokens, len(cuts), between, most_held(num_prompt, cuts), note)


@dataclass(frozen=True)
class DecodeStats:
    """How an answer was cut while it was generated."""

    budget: int
    interval: int
    """New tokens between two cuts."""
    method: str
    """Its name, with the options that differ from its defaults."""
    num_cuts: int
    """That found too many tokens in a layer."""
    note: str | None
    """What became of the budget, where it was not followed."""


@dataclass(frozen=True)
class DecodeBudget:
    """How a cache is cut while an answer is generated, so that it does not grow with it."""

    budget: int
    """Tokens that are kept at each cut, the prompt's among them."""
    interval: int = DECODE_INTERVAL
    """New tokens between two cuts, the first of which comes so many tokens behind the prompt."""

    def check(self, window_size: int) -> None:
        """Refuse what is no number of tokens, or leaves an observation window no room.

        Raises:
            ConfigError: naming it.
        """
        _check_counts(max(1, window_size), decode_budget=self.budget, decode_interval=self.interval)

    def stats(self, method: str, num_cuts: int) -> DecodeStats:
        """What is to be told of the cuts that a method made."""
        note = None
        if not num_cuts:
            due = f"whenever decode_interval={self.interval} new tokens have come, where more is held"
            note = f"decode_budget={self.budget} had no effect: no cut came due, which one does {due}"
        return DecodeStats(self.budget, self.interval, method, num_cuts, note)

    def next_cut(self, num_prompt: int, num_held: int, num_read: int) -> Cut:
        """The first cut behind `num_read` tokens.

        Args:
            num_held: of the prompt, once it was read and cut.
        """
        number = max(1, (num_read - num_prompt) // self.interval + 1)
        first = max(1, (self.budget - num_held) // self.interval + 1)  # of those that find too many tokens
        if number <= first:
            return Cut(num_prompt + first * self.interval, num_held + first * self.interval, self.budget)
        return Cut(num_prompt + number * self.interval, self.budget + self.interval, self.budget)


def _check_counts(least: int, **counts: int) -> None:
    for name, value in counts.items():
        check_count(name, value)
        if value < least:
            raise ConfigError(f"must be at least {least}, the observation window's tokens", option=name, value=value)


def least_end(window_size: int) -> int:
    """Tokens that a prompt has behind its last cut but one, at least: the window that observes its end.

    And never one alone, which engines read as they read a token that was generated.
    """
    return max(2, window_size)


def num_of_end(num_left: int, window_size: int) -> int:
    """How many tokens of a prompt's end are read beforehand, when it is cut in front of so many.

    Args:
        window_size: the most tokens that observe a cut; none read the end where none do.
    """
    return min(max(END_TOKENS, window_size), num_left) if window_size else 0


def prompt_cuts(num_prompt: int, num_kept: int, window_size: int, chunks: Chunks | None = None) -> list[Cut]:
    """How a prompt is cut, the last time at its end; no cut where nothing is evicted.

    Args:
        num_kept: what stays in the end.
        window_size: the most tokens that observe a cut.
        chunks: None: it is cut at its end alone.
    """
    cuts: list[Cut] = []
    num_read = num_held = 0
    between = 0 if chunks is None else max(chunks.budget, num_kept)
    ends = () if chunks is None else range(chunks.tokens, num_prompt - least_end(window_size) + 1, chunks.tokens)
    for end in ends:
        num_held, num_read = num_held + end - num_read, end
        if num_held > between:
            cuts.append(Cut(end, num_held, between))
            num_held = between
    num_held += num_prompt - num_read
    if num_held > num_kept:
        cuts.append(Cut(num_prompt, num_held, num_kept))
    return cuts


def most_held(num_prompt: int, cuts: Sequence[Cut]) -> int:
    """Tokens that are held at once while a prompt is read."""
    in_the_end = num_prompt - (cuts[-1].num_lost if cuts else 0)
    return max([in_the_end, *(cut.num_held for cut in cuts)])
