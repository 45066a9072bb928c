"""Means with intervals: bootstrap over cases, or over documents that several cases share; 95 %, percentile method."""

from collections import defaultdict
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


def macro_interval(
    groups: Sequence[Mapping[K, float]], documents: Mapping[K, Hashable] | None = None, seed: int = 0
) -> Interval:
    """The mean of the groups' means; each group's cases are drawn anew by themselves.

    Cases that share a document are drawn together, since they are not independent: a bootstrap of clusters, whose
    resampled means weigh cases alike (A. Davison, D. Hinkley: Bootstrap Methods and their Application, 1997, 3.8).
    Of groups of one case or document each, or of equal cases, the interval has no width: it says nothing then.

    Args:
        groups: values by case.
        documents: of cases; one that is not in it has its own.
    Raises:
        ConfigError: scipy is missing.
        ValueError: there are no groups, or one has no values.
    """
    import numpy as np

    if not groups or not all(groups):
        raise ValueError("a mean needs at least one value of each group")
    mean = sum(sum(group.values()) / len(group) for group in groups) / len(groups)
    if all(len(set(group.values())) == 1 for group in groups):
        return Interval(mean, mean, mean)
    totals = [_totals(group, documents or {}) for group in groups]

    def mean_of_means(*drawn: "np.ndarray[Any, Any]", axis: int) -> Any:
        picked = [total[:, index.astype(int)].sum(axis) for total, index in zip(totals, drawn, strict=True)]
        return sum(values / cases for values, cases in picked) / len(picked)

    # scipy refuses a group of one document: drawn from twice it is the same
    samples = [np.arange(total.shape[1]) if total.shape[1] > 1 else np.zeros(2) for total in totals]
    found = _bootstrap()(
        samples,
        mean_of_means,
        n_resamples=_NUM_RESAMPLES,
        batch=_NUM_RESAMPLES // 10,  # bounds the memory: a benchmark may have thousands of cases
        vectorized=True,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def macro_paired_difference(
    pairs: Sequence[tuple[Mapping[K, float], Mapping[K, float]]],
    documents: Mapping[K, Hashable] | None = None,
    seed: int = 0,
) -> Difference | None:
    """The mean over groups of how much higher the first of a pair is, over the cases that both have.

    Returns: None where a group has no case in common.
    """
    groups = [{case: a[case] - b[case] for case in a if case in b} for a, b in pairs]
    if not groups or not all(groups):
        return None
    return Difference(*macro_interval(groups, documents, seed), sum(map(len, groups)))


def _totals(group: Mapping[K, float], documents: Mapping[K, Hashable]) -> "np.ndarray[Any, Any]":
    """The sum of each document's values, and how many they are.

    Returns: `(2, documents)`.
    """
    import numpy as np

    shared: dict[Hashable, list[float]] = defaultdict(list)
    for case, value in group.items():
        shared[documents.get(case, case)].append(value)
    return np.array([[sum(values), len(values)] for values in shared.values()], dtype=float).T


def _bootstrap() -> Any:
    try:
        from scipy.stats import bootstrap
    except ImportError:
        raise ConfigError("intervals need scipy: pip install 'compresskv[eval]'") from None
    return bootstrap
