"""Which methods, at which budgets, a run compares."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from compresskv.errors import ConfigError
from compresskv.evaluation.runner import SETTINGS, Configuration
from compresskv.methods import registry
from compresskv.methods.base import Method
from compresskv.methods.prepare import prepare_method
from compresskv.profiles.profile import Profile
from compresskv.selection.budgets import parse_budget
from compresskv.system.check import check_known

FULL = "full"


def parse_names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """'a,b' as names, each once.

    Args:
        option: the parameter they are given as, for error messages.
    Raises:
        ConfigError: one is unknown, or there is none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        check_known(option, name, known)
    if not names:
        raise ConfigError(f"names nothing: choose from {', '.join(known)}", option=option, value=text)
    return names


def parse_budgets(text: str) -> tuple[int | float, ...]:
    """'64,128,3%' as budgets.

    Raises:
        ConfigError: one is none, or there is none.
    """
    parsed = [parse_budget(part) for part in text.split(",") if part.strip()]
    budgets = tuple({repr(budget): budget for budget in parsed}.values())  # 1 token and 100 % are equal as numbers
    if not budgets:
        raise ConfigError("names no budget: give counts (128) or shares (3%)", option="budgets", value=text)
    return budgets


def configurations(
    model: PreTrainedModel,
    methods: dict[str, Method],
    budgets: Sequence[int | float],
    settings: Sequence[str] = SETTINGS[:1],
    profile: Profile | str | Path | None = None,
) -> list[Configuration]:
    """The full cache, and every other method at every budget in every setting.

    Raises:
        ProfileError: a method needs a profile and the model has none.
        ConfigError: a method looks ahead in the agnostic setting.
    """
    prepared = {
        name: prepare_method(model, method, profile if method.needs_profile else None)
        for name, method in methods.items()
        if method.name != FULL
    }
    for name, method in prepared.items():
        if method.lookahead and "agnostic" in settings:
            problem = "looks ahead, which in the setting 'agnostic' is at the question"
            raise ConfigError(problem, option="methods", value=name)
    full = Configuration(FULL, registry.create(FULL), None)
    return [full] + [
        Configuration(name, method, budget, setting)
        for setting in settings
        for budget in budgets
        for name, method in prepared.items()
    ]
