"""Curves under which most measured losses lie, and how they do on models and tasks that they were not fitted on.

A point is one prompt, cut by one method to one count of tokens: the share of the window's attention that was left
uncovered, and the KL divergence that was measured.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compresskv.evaluation.records import Record
from compresskv.selection.auto_budget import LossCurve

POWERS = [1 + step / 8 for step in range(25)]
SMALLEST = 1e-4
"""Nats per token: below, losses count as equal."""


class Point(NamedTuple):
    """What one record says."""

    method: str
    model: str
    task: str
    uncovered: float
    loss: float


def points_of(records: Iterable[Record]) -> list[Point]:
    """Those of records whose coverage and loss were measured, and that evict anything."""
    return [
        Point(record.method, record.versions["model"], record.task, record.uncovered, record.kl_divergence)
        for record in records
        if record.uncovered and record.kl_divergence is not None
    ]


def fit(points: Sequence[Point], level: float) -> LossCurve:
    """The line in logarithms that has a share `level` of the points below it, and is the nearest to them.

    Quantile regression; each power has its scale, and the one with the least pinball loss is taken.
    """
    logs = [(math.log(max(point.uncovered, 1e-6)), math.log(max(point.loss, SMALLEST))) for point in points]

    def residual_quantile(power: float) -> tuple[float, float]:
        residuals = sorted(loss - power * uncovered for uncovered, loss in logs)
        height = residuals[min(len(residuals) - 1, math.ceil(level * len(residuals)) - 1)]
        above = sum(level * max(0.0, one - height) + (1 - level) * max(0.0, height - one) for one in residuals)
        return above, height

    power = min(POWERS, key=lambda one: residual_quantile(one)[0])
    return LossCurve(math.exp(residual_quantile(power)[1]), power)


def share_below(points: Sequence[Point], curve: LossCurve) -> float:
    """The share of points whose loss is at most what the curve says."""
    return sum(max(one.loss, SMALLEST) <= max(curve.loss(one.uncovered), SMALLEST) for one in points) / len(points)


def left_out(points: Sequence[Point], of: str, level: float) -> dict[str, tuple[LossCurve, float, int]]:
    """For each model or task (`of`): the curve of all others, the share of its points below, and how many it has."""
    found = {}
    for value in sorted({getattr(point, of) for point in points}):
        own = [point for point in points if getattr(point, of) == value]
        others = [point for point in points if getattr(point, of) != value]
        if others:
            curve = fit(others, level)
            found[value] = curve, share_below(own, curve), len(own)
    return found
