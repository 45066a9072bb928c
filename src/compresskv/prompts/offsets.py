"""Which tokens hold which characters."""

from collections.abc import Sequence


def token_range(offsets: Sequence[tuple[int, int]], start: int, end: int) -> slice:
    """The tokens that hold any of the characters from `start` to `end`; `offsets` are the tokens' own (start, end)."""
    first = sum(1 for _, token_end in offsets if token_end <= start)
    return slice(first, max(first, sum(1 for token_start, _ in offsets if token_start < end)))
