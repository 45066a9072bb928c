"""Fitting curves of loss over coverage, and judging them by what was left out."""

import random

import pytest

from compresskv.evaluation.loss_curves import Point, fit, left_out, points_of, share_below
from compresskv.evaluation.records import Record
from compresskv.selection.auto_budget import LossCurve


def cloud(scale: float, power: float, count: int = 400, model: str = "m", seed: int = 0) -> list[Point]:
    """Losses of a tenth to one times what the curve says."""
    draw = random.Random(seed)
    shares = [draw.uniform(0.02, 0.4) for _ in range(count)]
    return [Point("blend", model, "t", u, draw.uniform(0.1, 1) * scale * u**power) for u in shares]


@pytest.mark.parametrize(("scale", "power"), [(20.0, 2.0), (200.0, 3.0)])
def test_a_curve_that_made_the_points_is_found(scale: float, power: float) -> None:
    curve = fit(cloud(scale, power), 0.97)
    assert curve.power == pytest.approx(power, abs=0.13)
    assert curve.loss(0.1) == pytest.approx(0.97 * scale * 0.1**power, rel=0.1)


@pytest.mark.parametrize("level", [0.5, 0.9, 1.0])
def test_that_share_of_the_points_lies_below(level: float) -> None:
    points = cloud(20.0, 2.0)
    assert share_below(points, fit(points, level)) == pytest.approx(level, abs=0.01)


def test_a_worse_model_is_seen_when_it_is_left_out() -> None:
    points = cloud(20.0, 2.0, model="good") + cloud(200.0, 2.0, model="bad", seed=1)
    found = left_out(points, "model", 0.97)
    assert found["good"][1] == 1.0
    assert found["bad"][1] < 0.2
    assert found["bad"][2] == 400
    assert left_out(points, "task", 0.97) == {}


def test_points_are_what_the_records_hold() -> None:
    shared = {"example": "1", "setting": "aware", "prompt_sha256": "0", "prompt_tokens": 9, "truncated_tokens": 0}
    sizes = {"retained_tokens": 4.0, "kv_nbytes": 1, "kv_nbytes_full": 2, "versions": {"model": "m"}}

    def record(method: str, uncovered: float | None, loss: float | None) -> Record:
        measured = {"kl_divergence": loss, "uncovered": uncovered}
        return Record(task="needle", method=method, budget="auto[max_loss=0.1]", **shared, **sizes, **measured)

    records = [
        record("blend[num_sinks=0]", 0.125, 0.03),
        record("blend", 0.0, 0.0),  # all was kept
        record("blend", 0.1, None),
        record("snapkv", None, 0.2),
    ]
    assert points_of(records) == [("blend[num_sinks=0]", "m", "needle", 0.125, 0.03)]


def test_less_uncovered_is_less_lost() -> None:
    curve = LossCurve(2.0, 3.0)
    assert curve.loss(-1e-9) == curve.loss(0.0) == 0.0
    assert curve.loss(0.1) < curve.loss(0.2)
