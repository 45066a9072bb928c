"""What the peers' process is asked to do: cases, presses and budgets, as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compresskv.budgets import check_budget
from compresskv.errors import ConfigError, DataError, first_line

SETTINGS = ("aware", "agnostic")
BUDGET_UNITS = ("tokens", "bytes")


@dataclass(frozen=True)
class PeerCase:
    """One prompt, as token ids, so that a peer reads exactly what our methods read."""

    task: str
    example: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    suffix_start: int | None = None
    """The question's first token: where the query-agnostic setting cuts the prompt. None: it cannot be cut."""
    reference_ids: tuple[int, ...] = ()
    """The full cache's own answer; empty: nothing to compare with."""
    reference_log_probs: str | None = None
    """A .pt or .npz file with the full cache's log-probabilities after each of `reference_ids` but the last:
    (n - 1, vocab), as `fidelity.reference` gives them. None: no divergence is measured."""


@dataclass(frozen=True)
class PeerRequest:
    """Cases to be run with every press, at every budget, in every setting."""

    model: str
    cases: tuple[PeerCase, ...]
    presses: tuple[str, ...]
    budgets: tuple[int | float, ...]
    """Counts of tokens, or fractions of what is compressed: the prompt, or in the agnostic setting its context."""
    settings: tuple[str, ...] = ("aware",)
    dtype: str | None = None
    device: str | None = None
    peer_budget: str = "tokens"
    """What `retained_tokens` counts of a press that masks instead of freeing: 'tokens', those it does not mask;
    'bytes', those it holds, which is the whole prompt at any budget."""

    def __post_init__(self) -> None:
        for budget in self.budgets:
            check_budget(budget)
        for setting in self.settings:
            if setting not in SETTINGS:
                raise ConfigError(f"setting={setting!r} is unknown: choose from {', '.join(SETTINGS)}")
        if self.peer_budget not in BUDGET_UNITS:
            raise ConfigError(f"peer_budget={self.peer_budget!r} is unknown: choose from {', '.join(BUDGET_UNITS)}")

    def write(self, path: Path) -> None:
        """Store it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "PeerRequest":
        """Load what `write` stored.

        Raises:
            DataError: the file is missing or malformed.
            ConfigError: a budget or setting cannot work.
        """
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            cases = tuple(PeerCase(**_with_tuples(case)) for case in raw.pop("cases"))
            return cls(cases=cases, **_with_tuples(raw))
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
            raise DataError(f"--request {path}: not a request for peers ({first_line(err)})") from err


def _with_tuples(raw: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
