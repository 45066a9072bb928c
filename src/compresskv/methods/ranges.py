"""What numbers a method's options may be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both included."""

    least: float
    most: float = math.inf
    odd: bool = False
    """Whole odd numbers only."""
    above: bool = False
    """`least` itself is not included."""
    why: str = ""
    """The reason, for who is refused."""

    def problem(self, value: float) -> str | None:
        """What is wrong with a number, to follow its name; None: nothing."""
        if self.least <= value <= self.most and not (self.odd and value % 2 == 0) and not self._at_bound(value):
            return None
        if self.most < math.inf:
            told = f"must lie between {self.least} and {self.most}"
        elif self.odd:
            told = f"must be an odd number of at least {self.least}"
        elif self.least == 0:
            told = "must be positive" if self.above else "must not be negative"
        else:
            told = f"must be {'above' if self.above else 'at least'} {self.least}"
        return f"{told}: {self.why}" if self.why else told

    def _at_bound(self, value: float) -> bool:
        return self.above and value == self.least


def ranges(**by_option: Range) -> Mapping[str, Range]:
    """Ranges by the names of options, for a class to share with its subclasses: read-only."""
    return MappingProxyType(by_option)
