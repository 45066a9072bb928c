"""Which methods a budget that each prompt decides may be given to."""

from compresskv.errors import ConfigError
from compresskv.methods.base import Method
from compresskv.methods.registry import methods
from compresskv.selection.auto_budget import as_typed
from compresskv.selection.budgets import Budget, is_auto


def check_predicts(method: Method, budget: Budget) -> None:
    """Refuse an automatic budget for a method of which nobody knows what it loses, or that looks ahead.

    Raises:
        ConfigError: naming the methods that can.
    """
    if not is_auto(budget) or method.brings_budget:
        return
    if method.loss_curve() is None:
        able = ", ".join(repr(name) for name, kind in methods().items() if kind.general_loss is not None)
        problem = f"needs a method whose loss can be predicted: use {able}, not {method.name!r}"
        raise ConfigError(problem, option="budget", value=as_typed(budget))
    if method.lookahead:
        raise ConfigError(
            f"cannot look ahead: leave out lookahead={method.lookahead}", option="budget", value=as_typed(budget)
        )
