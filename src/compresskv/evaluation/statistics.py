"""Means with intervals: bootstrap over cases, 95 %, percentile method."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from compresskv.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

K = TypeVar("K", bound=Hashable)

_NUM_RESAMPLES = 2000  # an end of an interval of 0.1 is then known to about 0.002


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean of differences, its 95 % interval, and the number of cases that it is over."""

    mean: float
    low: float
    high: float
    num_cases: int


def macro_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The mean of the groups' means; each group's cases are drawn anew by themselves.

    Of groups of one case each, or of equal ones, the interval has no width: it says nothing then.

    Raises:
        ConfigError: scipy is missing.
        ValueError: there are no groups, or one has no values.
    """
    import numpy as np

    if not groups or not all(len(group) for group in groups):
        raise ValueError("a mean needs at least one value of each group")
    mean = sum(float(np.mean(group)) for group in groups) / len(groups)
    if all(min(group) == max(group) for group in groups):
        return Interval(mean, mean, mean)
    # scipy refuses a group of one case: twice the same value resamples to the same mean
    samples = [list(group) if len(group) > 1 else [group[0]] * 2 for group in groups]
    found = _bootstrap()(
        samples,
        _mean_of_means,
        n_resamples=_NUM_RESAMPLES,
        batch=_NUM_RESAMPLES // 10,  # bounds the memory: a benchmark may have thousands of cases
        vectorized=True,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def macro_paired_difference(
    pairs: Sequence[tuple[Mapping[K, float], Mapping[K, float]]], seed: int = 0
) -> Difference | None:
    """The mean over groups of how much higher the first of a pair is, over the cases that both have.

    Returns: None where a group has no case in common.
    """
    groups = [[a[case] - b[case] for case in a if case in b] for a, b in pairs]
    if not groups or not all(groups):
        return None
    return Difference(*macro_interval(groups, seed), sum(map(len, groups)))


def _mean_of_means(*samples: "np.ndarray[Any, Any]", axis: int) -> Any:
    return sum(sample.mean(axis=axis) for sample in samples) / len(samples)


def _bootstrap() -> Any:
    try:
        from scipy.stats import bootstrap
    except ImportError:
        raise ConfigError("intervals need scipy: pip install 'compresskv[eval]'") from None
    return bootstrap
