"""Fewer cases of a test with many parameters: every pair of values stays together in one case at least."""

from collections.abc import Hashable, Sequence
from itertools import combinations

Pair = tuple[tuple[int, Hashable], tuple[int, Hashable]]


def covering_pairs(cases: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """The numbers of cases that together hold every pair of values that any of `cases` holds; the same at every call.

    Greedy: the case with the most new pairs comes next. For the whole product of lists, about as many are left as the
    product of the two longest.
    """
    pairs = [set(combinations(enumerate(case), 2)) for case in cases]
    missing: set[Pair] = set().union(*pairs)
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
