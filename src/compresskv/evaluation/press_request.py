"""What kvpress's process is asked to do: cases, presses and budgets."""

from dataclasses import dataclass

from compresskv.evaluation.records import SETTINGS, config_name
from compresskv.peers.presses import check_presses, method_name
from compresskv.selection.budgets import SharedBudget, check_budget, known_beforehand
from compresskv.system.check import check_known

BUDGET_UNITS = ("tokens", "bytes")


@dataclass(frozen=True)
class PressCase:
    """One prompt, as token ids, so that a peer reads exactly what our methods read."""

    task: str
    example: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    suffix_start: int | None = None
    """The question's first token: where the query-agnostic setting cuts the prompt. None: it cannot be cut."""
    reference_ids: tuple[int, ...] = ()
    """The full cache's own answer; empty: nothing to compare with."""
    done: tuple[str, ...] = ()
    """Configurations that are not run on this case, by `config_name`."""


@dataclass(frozen=True)
class PressRequest:
    """Cases to be run with every press, at every budget, in every setting."""

    model: str
    cases: tuple[PressCase, ...]
    presses: tuple[str, ...]
    budgets: tuple[SharedBudget, ...]
    """Counts of tokens, fractions of what is compressed (the prompt, or in the agnostic setting its context), or bytes:
    a press retains as many tokens as those bytes hold as the model computes them."""
    settings: tuple[str, ...] = ("aware",)
    dtype: str | None = None
    device: str | None = None
    peer_budget: str = "tokens"
    """What `retained_tokens` says of a press that masks instead of freeing: 'tokens', those it leaves unmasked;
    'bytes', all those it holds, which is the whole prompt at any budget. It changes this figure, not what is run."""

    def __post_init__(self) -> None:
        check_presses(self.presses)
        for budget in self.budgets:
            check_budget(budget)
            if self.presses:
                known_beforehand(budget, "budgets")
        for setting in self.settings:
            check_known("settings", setting, SETTINGS)
        check_known("peer_budget", self.peer_budget, BUDGET_UNITS)

    def configs(self) -> dict[str, tuple[str, str, SharedBudget]]:
        """(setting, press, budget) of every configuration, by the name that its records have."""
        return {
            config_name(method_name(press), budget, setting): (setting, press, budget)
            for setting in self.settings
            for press in self.presses
            for budget in self.budgets
        }

    def pending(self, case: PressCase) -> list[tuple[str, str, SharedBudget]]:
        """(setting, press, budget) of what is to be run on a case."""
        return [config for name, config in self.configs().items() if name not in case.done]
