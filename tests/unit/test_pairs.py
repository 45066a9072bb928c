"""The cases that are left of a test with many parameters."""

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from pairs import covering_pairs


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_every_pair_of_values_stays(sizes: list[int]) -> None:
    cases = list(product(*(range(size) for size in sizes)))
    kept = [cases[number] for number in covering_pairs(cases)]
    for (one, first), (other, second) in combinations(enumerate(sizes), 2):
        found = {(case[one], case[other]) for case in kept}
        assert found == set(product(range(first), range(second)))


def test_few_are_left() -> None:
    cases = list(product(range(6), range(2), range(11), range(3)))
    assert 66 <= len(covering_pairs(cases)) <= 75


def test_cases_that_do_not_exist_are_not_needed() -> None:
    assert covering_pairs([("a", 1, True), ("b", 2, True), ("b", 1, True)]) == [0, 1, 2]
    assert covering_pairs([]) == []
