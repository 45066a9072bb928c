"""Means with intervals: by hand where cases are few, by the textbook where they are many."""

import math
import random
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="the 'eval' extra is not installed")

from compresskv.errors import ConfigError
from compresskv.evaluation.statistics import (
    Difference,
    macro_interval,
    macro_paired_difference,
)


def numbered(*groups: Sequence[float]) -> list[dict[int, float]]:
    return [dict(enumerate(group)) for group in groups]


def test_the_interval_of_many_cases_is_the_normal_one() -> None:
    rng = random.Random(0)
    values = [rng.gauss(0.5, 0.1) for _ in range(400)]
    mean, low, high = macro_interval(numbered(values))
    assert mean == pytest.approx(sum(values) / 400)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 400)
    half = 1.96 * deviation / math.sqrt(400)
    assert low == pytest.approx(mean - half, abs=half / 5)
    assert high == pytest.approx(mean + half, abs=half / 5)


def test_two_cases_resample_to_either_or_both() -> None:
    assert macro_interval(numbered([0.0, 1.0])) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("values", [[0.25], [0.25] * 7])
def test_one_case_or_equal_ones_give_no_width(values: list[float]) -> None:
    assert macro_interval(numbered(values)) == (0.25, 0.25, 0.25)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.9, 0.4, 0.35, 0.0]
    assert macro_interval(numbered(values), seed=3) == macro_interval(numbered(values), seed=3)
    assert macro_interval(numbered(values), seed=3) != macro_interval(numbered(values), seed=4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_an_interval_holds_its_mean_and_lies_within_the_values(values: list[float]) -> None:
    mean, low, high = macro_interval(numbered(values))
    assert min(values) - 1e-12 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= max(values) + 1e-12


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], []]])
def test_no_values_have_no_mean(groups: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        macro_interval(numbered(*groups))


def test_cases_of_one_document_are_drawn_together() -> None:
    values = {(document, question): float(document % 2) for document in range(20) for question in range(5)}
    alone = macro_interval([values])
    together = macro_interval([values], {case: case[0] for case in values})
    of_documents = macro_interval([{document: float(document % 2) for document in range(20)}])
    assert together == pytest.approx(of_documents)
    assert alone.mean == together.mean
    assert together.high - together.low > 2 * (alone.high - alone.low)  # five equal cases: the root of five


def test_cases_weigh_alike_however_many_share_a_document() -> None:
    found = macro_interval([{"a": 1.0, "b": 1.0, "c": 1.0, "alone": 0.0}], dict.fromkeys("abc", "one"))
    assert found == (0.75, 0.0, 1.0)


def test_differences_know_of_documents_too() -> None:
    documents = {case: case // 10 for case in range(40)}
    ours = {case: float(document % 2) for case, document in documents.items()}
    theirs = dict.fromkeys(ours, 0.0)
    found, alone = macro_paired_difference([(ours, theirs)], documents), macro_paired_difference([(ours, theirs)])
    assert found is not None
    assert alone is not None
    assert (found.low, found.high) == (0.0, 1.0)
    assert 0.0 < alone.low < alone.high < 1.0


def test_tasks_weigh_alike_however_many_cases_they_have() -> None:
    mean, low, high = macro_interval(numbered([1.0] * 90, [0.0, 1.0], [0.0]))
    assert mean == pytest.approx((1 + 0.5 + 0) / 3)
    assert (low, high) == (pytest.approx(1 / 3), pytest.approx(2 / 3))  # only the second task varies


def test_differences_are_over_the_cases_that_both_have() -> None:
    ours = {"a": 1.0, "b": 0.75, "c": 0.5, "only ours": 0.0}
    theirs = {"a": 0.5, "b": 0.25, "c": 0.0, "only theirs": 1.0}
    assert macro_paired_difference([(ours, theirs)]) == Difference(0.5, 0.5, 0.5, 3)


def test_pairing_finds_a_difference_that_the_spread_of_cases_hides() -> None:
    theirs = {case: case / 50 for case in range(40)}
    ours = {case: score + 0.02 * (1 + case % 2) for case, score in theirs.items()}
    found = macro_paired_difference([(ours, theirs)])
    assert found is not None
    assert found.low > 0.02
    assert macro_interval([ours]).low < macro_interval([theirs]).high


def test_without_a_common_case_there_is_no_difference() -> None:
    assert macro_paired_difference([({"a": 1.0}, {"b": 1.0})]) is None
    assert macro_paired_difference([]) is None
    assert macro_paired_difference([({"a": 1.0}, {"a": 0.0}), ({"a": 1.0}, {})]) is None


def test_differences_of_tasks_weigh_alike() -> None:
    many = (dict.fromkeys(range(9), 1.0), dict.fromkeys(range(9), 0.0))
    assert macro_paired_difference([many, ({"a": 0.5}, {"a": 0.5})]) == Difference(0.5, 0.5, 0.5, 10)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ConfigError, match=r"compresskv\[eval\]"):
        macro_interval(numbered([0.0, 1.0]))
