"""What numbers options may be, and that a method's options are held to it."""

from dataclasses import dataclass

import pytest

from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.cake import CAKE
from compresskv.methods.ranges import Range, ranges
from compresskv.methods.snapkv import SnapKV


@pytest.mark.parametrize(
    ("allowed", "good", "bad", "told"),
    [
        (Range(0), [0, 0.5, 10**9], [-1, -1e-9], "must not be negative"),
        (Range(1), [1, 1.5], [0, 0.99], "must be at least 1"),
        (Range(0, 1), [0, 0.2, 1], [-0.1, 1.1], "must lie between 0 and 1"),
        (Range(0, above=True), [1e-9, 3], [0, -1], "must be positive"),
        (Range(2, above=True), [2.1], [2, 1], "must be above 2"),
        (Range(1, odd=True), [1, 7], [0, 2, -1], "must be an odd number of at least 1"),
        (Range(1, why="it counts"), [1], [0], "must be at least 1: it counts"),
    ],
    ids=str,
)
def test_range(allowed: Range, good: list[float], bad: list[float], told: str) -> None:
    assert [allowed.problem(value) for value in good] == [None] * len(good)
    assert [allowed.problem(value) for value in bad] == [told] * len(bad)


@dataclass(frozen=True)
class Wide(SnapKV):
    """Narrows one range and adds one."""

    limits = ranges(window_size=Range(16), share=Range(0, 1))

    window_size: int = 32
    share: float = 0.5


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (Wide, {"share": 2.0}, "share=2.0 must lie between 0 and 1"),
        (Wide, {"window_size": 8}, "window_size=8 must be at least 16"),
        (Wide, {"kernel_size": 2}, "kernel_size=2 must be an odd number of at least 1"),
        (Wide, {"lookahead": -1}, "lookahead=-1 must not be negative"),
        (CAKE, {"window_size": 0}, "window_size=0 must be at least 1: its queries choose"),
        (CAKE, {"tau1": 0}, "tau1=0 must be positive"),
    ],
    ids=str,
)
def test_a_method_keeps_to_its_own_ranges_and_its_bases(
    kind: type[Method], options: dict[str, float], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**options)  # type: ignore[arg-type]
    assert str(caught.value) == told


def test_ranges_are_read_only() -> None:
    with pytest.raises(TypeError):
        SnapKV.limits["window_size"] = Range(0)  # type: ignore[index]
