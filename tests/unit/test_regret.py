"""The choice by the worst case, by hand on small tables and by its definition on drawn ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.choice.regret import NEGLIGIBLE, Cell, choose, leave_one_out, losses, worst
from compresskv.evaluation.records import Record

HIGH = 10.0  # losses that NEGLIGIBLE hardly changes


def record(model: str, task: str, example: str, method: str, budget: int | None, kl: float | None) -> Record:
    return Record(
        task=task, example=example, method=method, budget=budget, setting="aware", prompt_sha256="", prompt_tokens=9,
        truncated_tokens=0, retained_tokens=1, kv_nbytes=1, kv_nbytes_full=1, kl_divergence=kl,
        versions={"model": model},
    )  # fmt: skip


def test_losses_are_means_over_the_cases_that_all_have() -> None:
    records = [
        record("m", "a/x", "1", "p", 64, 1.0),
        record("m", "a/y", "1", "p", 64, 3.0),
        record("m", "a/x", "2", "p", 64, 99.0),  # q lacks it
        record("m", "a/x", "1", "q", 64, 0.5),
        record("m", "a/y", "1", "q", 64, 0.1),
        record("m", "a/x", "1", "p", 128, 7.0),
        record("m", "a/x", "3", "q", 128, 7.0),  # no case in common
        record("m", "b/x", "1", "p", 64, None),
        record("m", "b/x", "1", "full", None, 0.0),
    ]
    assert losses(records, lambda task: task[0]) == {Cell("m", "a", 64): {"p": 2.0, "q": pytest.approx(0.3)}}


def test_the_worst_cell_decides_and_not_the_mean() -> None:
    cells = [Cell(model, "a", 64) for model in ("m", "n", "o")]
    table = {
        cells[0]: {"bold": HIGH, "even": 1.9 * HIGH},
        cells[1]: {"bold": HIGH, "even": 1.9 * HIGH},
        cells[2]: {"bold": 2.5 * HIGH, "even": HIGH},
    }
    bold, even = worst(table, "bold"), worst(table, "even")
    assert (bold.cell, even.cell) == (cells[2], cells[0])
    assert bold.regret == pytest.approx(2.5, rel=0.01)
    assert bold.mean < even.mean
    assert choose(table, ["bold", "even"]) == "even"
    first, second, third = leave_one_out(table, ["bold", "even"])
    assert (first.held_out, first.chosen) == ("m", "even")
    assert (second.held_out, second.chosen) == ("n", "even")
    assert (third.held_out, third.chosen, third.unseen.cell) == ("o", "bold", cells[2])
    assert third.seen.regret == 1
    assert third.unseen.regret == bold.regret


def test_a_small_loss_is_not_worse_than_a_smaller_one() -> None:
    table = {Cell("m", "a", 64): {"p": 1e-6, "q": NEGLIGIBLE / 10}}
    assert worst(table, "q").regret == pytest.approx(1.1, abs=0.001)


def test_one_model_leaves_none_out() -> None:
    assert leave_one_out({Cell("m", "a", 64): {"p": 1.0}}, ["p"]) == []


@given(
    st.lists(st.lists(st.floats(0, 20), min_size=3, max_size=3), min_size=1, max_size=8),
)
def test_the_choice_has_the_least_largest_ratio(rows: list[list[float]]) -> None:
    names = ["p", "q", "r"]
    table = {Cell("m", str(at), 64): dict(zip(names, row, strict=True)) for at, row in enumerate(rows)}
    largest = {
        name: max((row[at] + NEGLIGIBLE) / (min(row) + NEGLIGIBLE) for row in rows) for at, name in enumerate(names)
    }
    assert largest[choose(table, names)] == min(largest.values())
    for name in names:
        assert worst(table, name).regret == largest[name]
        assert 1 <= worst(table, name).mean <= largest[name] + 1e-9
        assert math.isfinite(worst(table, name).mean)
