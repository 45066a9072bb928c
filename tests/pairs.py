"""Fewer cases of a test with many parameters: every pair of values stays together in one case at least."""

import heapq
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
    # What a case adds only falls, so that one whose count still holds once it comes first is the best.
    queue = [(-len(own), number) for number, own in enumerate(pairs)]
    heapq.heapify(queue)
    while missing:
        counted, number = queue[0]
        new = len(pairs[number] & missing)
        if new == -counted:
            heapq.heappop(queue)
            chosen.append(number)
            missing -= pairs[number]
        else:
            heapq.heapreplace(queue, (-new, number))
    return sorted(chosen)
