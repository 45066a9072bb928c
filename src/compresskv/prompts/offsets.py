"""Which tokens hold which characters."""

from collections.abc import Iterator, Sequence


def token_range(offsets: Sequence[tuple[int, int]], start: int, end: int) -> slice:
    """The tokens that hold any of the characters from `start` to `end`, whichever special tokens stand around them.

    Args:
        offsets: the tokens' own (start, end); special tokens hold no characters.
    """
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    if inside:
        return slice(inside[0], inside[-1] + 1)
    after = next((i for i, (_, last) in enumerate(offsets) if last > start), len(offsets))
    return slice(after, after)


def offsets_of(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Characters of the joined texts that each token holds: all tokens of one character hold it."""

    def walk() -> Iterator[tuple[int, int]]:
        start = end = 0
        for text in texts:
            if text:
                start, end = end, end + len(text)
            yield start, end

    return list(walk())
