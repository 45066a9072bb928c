"""Eviction errors of layers, as shares of their sum."""

import math
from collections.abc import Sequence


def l1_normalised(errors: Sequence[float]) -> tuple[float, ...]:
    """`errors` divided by their sum; uniform where all are 0."""
    total = math.fsum(errors)
    return tuple(error / total if total > 0 else 1 / len(errors) for error in errors)


def combined(errors_by_set: dict[str, tuple[float, ...]]) -> tuple[float, ...]:
    """Mean over calibration sets, L1-normalised again (CompressKV, section 3.3)."""
    columns = zip(*errors_by_set.values(), strict=True)
    return l1_normalised([math.fsum(column) / len(errors_by_set) for column in columns])
