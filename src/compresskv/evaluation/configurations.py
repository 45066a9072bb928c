"""What a run compares: methods at budgets, in settings and stores. More may be added to it later."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from transformers import PreTrainedModel

from compresskv.cache.costs import tokens_kept
from compresskv.errors import ConfigError
from compresskv.evaluation.records import SETTINGS, config_name
from compresskv.methods import registry
from compresskv.methods.base import Method
from compresskv.methods.predicting import check_predicts
from compresskv.methods.prepare import prepare_method
from compresskv.profiles.profile import Profile
from compresskv.selection.budget_words import ANY, any_of
from compresskv.selection.budgets import TOKENS, SharedBudget, is_auto, known_beforehand, parse_budget
from compresskv.selection.precision import NATIVE
from compresskv.system.check import check_known

FULL = "full"


@dataclass(frozen=True)
class Configuration:
    """One way to compress: what a row of a table stands for."""

    label: str
    """The method's name, with the options that differ from its defaults: 'snapkv[window_size=32]'."""
    method: Method
    budget: int | float | str | None
    """None for the full cache."""
    setting: str = "aware"
    """'agnostic': the document is read and compressed before the question comes."""
    store: str = NATIVE
    """In how many bits a number what is kept is held; see `compressing`."""

    @property
    def name(self) -> str:
        """What tables call it, and what tells it from the others of a run."""
        return config_name(self.label, self.budget, self.setting, self.store)

    @property
    def profile_digest(self) -> str | None:
        """What tells the method's profile from others; None where it has none."""
        profile = getattr(self.method, "profile", None)
        return None if profile is None else profile.digest


_COMMAS = re.compile(r",(?![^\[]*\])")
"""Those that part budgets, not the limits of one: 'auto[max_loss=0.1,at_most=512],256'."""


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


def parse_budgets(text: str, of: str = TOKENS, kinds: Sequence[str] = ANY) -> tuple[SharedBudget, ...]:
    """'64,128,3%' as budgets, or '3MB' in bytes.

    Args:
        of, kinds: as for `parse_budget`.
    Raises:
        ConfigError: one is none, or there is none.
    """
    parsed = [parse_budget(part, of, kinds) for part in _COMMAS.split(text) if part.strip()]
    budgets = tuple({repr(budget): budget for budget in parsed}.values())  # 1 token and 100 % are equal as numbers
    if not budgets:
        problem = f"names no budget: give {any_of(*kinds)}"
        raise ConfigError(problem, option="budgets", value=text)
    return budgets


def check_settings(methods: dict[str, Method], budgets: Sequence[SharedBudget], settings: Sequence[str]) -> None:
    """Refuse methods that look ahead, and budgets that each prompt decides, where that cannot be.

    Raises:
        ConfigError: in the agnostic setting, or such a budget for a method of which nobody knows what it loses.
    """
    for name, method in methods.items():
        if method.lookahead and "agnostic" in settings:
            problem = "looks ahead, which in the setting 'agnostic' is at the question"
            raise ConfigError(problem, option="methods", value=name)
    for budget in budgets:
        if "agnostic" in settings:
            known_beforehand(budget, "budgets")
        for method in methods.values():
            if method.name != FULL:
                check_predicts(method, budget)


def _check_room(model: PreTrainedModel, budgets: Sequence[SharedBudget], stores: Sequence[str]) -> None:
    for budget, store in product(budgets, stores):
        if is_auto(budget):
            continue
        try:
            tokens_kept(model, budget, sys.maxsize, store)
        except ConfigError as error:
            raise ConfigError(error.problem, option="budgets", value=budget) from None


def configurations(
    model: PreTrainedModel,
    methods: dict[str, Method],
    budgets: Sequence[SharedBudget],
    settings: Sequence[str] = SETTINGS[:1],
    profile: Profile | str | Path | None = None,
    stores: Sequence[str] = (NATIVE,),
) -> list[Configuration]:
    """The full cache, and every other method at every budget in every setting and store.

    The full cache in stores of fewer bits is among them where 'full' is among the methods.

    Raises:
        ProfileError: a method needs a profile and the model has none.
        ConfigError: as `check_settings`, or a budget has room for no token in one of the stores.
    """
    check_settings(methods, budgets, settings)
    _check_room(model, budgets, stores)
    prepared = {
        name: prepare_method(model, method, profile if method.needs_profile else None)
        for name, method in methods.items()
        if method.name != FULL
    }
    keeps_all = registry.create(FULL)
    whole = [Configuration(FULL, keeps_all, 1.0, store=store) for store in stores if store != NATIVE]
    return [Configuration(FULL, keeps_all, None), *(whole if FULL in methods else [])] + [
        Configuration(name, method, budget, setting, store)
        for setting in settings
        for budget in budgets
        for store in stores
        for name, method in prepared.items()
    ]
