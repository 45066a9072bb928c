"""Budgets that each prompt decides: as many tokens as keep its predicted loss within a limit."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from compresskv.errors import ConfigError

AUTO = "auto"
MAX_LOSS = 0.1
"""Nats per token, as `kl_divergence` of evaluations: the loss that is allowed where none is given."""
LEAST_TOKENS = 128
"""What is kept of a prompt at least: below, methods would have to narrow the window that the loss is predicted by."""
_STEP = 2**0.25
_TEXT = re.compile(rf"{AUTO}\s*(?:\[(.*)\])?", re.DOTALL)


@dataclass(frozen=True)
class AutoBudget:
    """What such a budget allows."""

    max_loss: float = MAX_LOSS
    """The largest predicted loss, in nats per token."""
    at_most: str | None = None
    """A ceiling, as budgets are typed: '1024', '25%', '3MB'."""

    @property
    def text(self) -> str:
        """As `find_auto_budget` reads it: 'auto[max_loss=0.1,at_most=1024]'."""
        ceiling = "" if self.at_most is None else f",at_most={self.at_most}"
        return f"{AUTO}[max_loss={self.max_loss:g}{ceiling}]"


@dataclass(frozen=True)
class AutoChoice:
    """What was chosen for one prompt, and why."""

    tokens: int
    """Kept per KV head and layer, on average."""
    uncovered: float
    """The share of the window's attention that goes to tokens which are not kept."""
    predicted_loss: float
    """Nats per token, told from that; most prompts lose less (docs/auto.md)."""
    max_loss: float
    """What was allowed."""
    why: str
    """'loss': fewer would lose more than is allowed; 'least': no prompt keeps fewer; 'at_most': the ceiling, though
    more is lost than is allowed; 'all': nothing may go."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LossCurve:
    """What is lost where a share of the window's attention went to tokens that are not kept.

    loss = scale * uncovered ** power: a line in logarithms, laid so high that most measured losses lie below it.
    """

    scale: float
    power: float

    def loss(self, uncovered: float) -> float:
        """Nats per token."""
        return self.scale * math.pow(max(0.0, uncovered), self.power)


def find_auto_budget(text: str) -> AutoBudget | None:
    """'auto', or 'auto[max_loss=0.05,at_most=25%]'; None where it is another budget.

    Raises:
        ConfigError: it allows what cannot be, or something unknown.
    """
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        return None
    given = {}
    for part in filter(None, map(str.strip, (found[1] or "").split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("max_loss", "at_most") or not value or name in given:
            problem = "takes max_loss=LOSS and at_most=BUDGET, once each"
            raise ConfigError(problem, option="budget", value=text)
        given[name] = value
    return AutoBudget(_max_loss(given.get("max_loss"), text), given.get("at_most"))


def as_typed(budget: object) -> object:
    """A budget for a message: 'auto' alone where it allows what it does anyway."""
    return AUTO if budget == AutoBudget().text else budget


def _max_loss(given: str | None, text: str) -> float:
    if given is None:
        return MAX_LOSS
    try:
        loss = float(given)
    except ValueError:
        loss = math.nan
    if not 0 < loss < math.inf:
        raise ConfigError("allows a loss that is no number above 0", option="budget", value=text)
    return loss


def with_limits(budget: str, max_loss: float | None, at_most: str | None) -> str:
    """'auto' with what it allows, as one text; any other budget as it is.

    Raises:
        ConfigError: another budget is given what limits this one, or limits are given twice.
    """
    given = {"max_loss": None if max_loss is None else f"{max_loss:g}", "at_most": at_most}
    parts = [f"{name}={value}" for name, value in given.items() if value is not None]
    if not parts:
        return budget
    if budget.strip() != AUTO:
        option, value = ("max_loss", max_loss) if max_loss is not None else ("max_budget", at_most)
        raise ConfigError(f"is for budget={AUTO!r}, not for {budget!r}", option=option, value=value)
    return f"{AUTO}[{','.join(parts)}]"


def rungs(least: int, most: int) -> list[int]:
    """The counts of tokens that are tried, ascending, each at most a fifth more than the one before."""
    if most <= least:
        return [most]
    count = math.ceil(math.log(most / least, _STEP))
    return sorted({*(min(most, round(least * _STEP**step)) for step in range(count)), most})
