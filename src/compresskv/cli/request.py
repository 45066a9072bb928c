"""The parameters that `ask` and `explain` share, and what is done with them before and after a model is loaded."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli.kept import check_unused
from compresskv.cli.options import (
    AutoBudgetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxBudgetOption,
    MaxLossOption,
    MethodOption,
    ModelOption,
    OfOption,
    ProfileOption,
    SettingsOption,
    StoreOption,
    TruncateOption,
    check_profile,
    create_methods,
)
from compresskv.cli.terminal import Bar
from compresskv.errors import ConfigError
from compresskv.methods.predicting import check_predicts
from compresskv.prompts.document import read_document
from compresskv.prompts.request import check_request
from compresskv.selection.auto_budget import with_limits
from compresskv.selection.budget_words import BEFOREHAND
from compresskv.selection.budgets import TOKENS, known_beforehand, parse_budget
from compresskv.selection.precision import NATIVE, find_precision
from compresskv.system.check import check_least

if TYPE_CHECKING:
    from compresskv.methods.base import Method


@dataclass(frozen=True)
class Request:
    """A question about a document, by one method or several; each field is a parameter of the command."""

    document: Annotated[str, typer.Argument(help="A text file, - for standard input, or a session.")]
    question: Annotated[str, typer.Argument(help="What to ask about it.")]
    model: ModelOption = defaults.MODEL
    method: MethodOption = defaults.METHOD
    budget: AutoBudgetOption = str(defaults.BUDGET)
    max_loss: MaxLossOption = None
    max_budget: MaxBudgetOption = None
    of: OfOption = TOKENS
    store: StoreOption = NATIVE
    compare: Annotated[str, typer.Option(help="More methods beside it, separated by commas.", metavar="METHODS")] = ""
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", metavar="TOKENS")] = 128
    truncate: TruncateOption = "never"
    profile: ProfileOption = None
    settings: SettingsOption = None
    dtype: DtypeOption = None
    device: DeviceOption = None
    as_json: JsonOption = False

    @property
    def inputs(self) -> dict[str, Any]:
        """What is read, and must not be written over."""
        return {"document": self.document, "profile": self.profile, "model": self.model}

    def check_session(self, least_tokens: int = 1) -> None:
        """What `checked` is for a document, for one that was read before.

        Raises:
            CompressKVError: anything that can be found wrong without the model.
        """
        own = ("document", "question", "model", "max_new_tokens", "dtype", "device", "as_json")
        check_unused(**{field.name: getattr(self, field.name) for field in fields(self) if field.name not in own})
        check_least("max_new_tokens", self.max_new_tokens, least_tokens)
        check_request("document", self.question, "never")

    def checked(self, least_tokens: int = 1) -> "Checked":
        """The document, the budget and the methods.

        Args:
            least_tokens: what `max_new_tokens` must be at least.
        Raises:
            CompressKVError: anything that can be found wrong without the model.
        """
        check_least("max_new_tokens", self.max_new_tokens, least_tokens)
        budget = self._budget()
        find_precision(self.store)
        methods = create_methods(self.method, self.compare, self.settings)
        for one in methods:
            check_predicts(one, budget)
        check_profile(self.profile)
        context = read_document(self.document)
        check_request(context, self.question, self.truncate)
        return Checked(self, context, budget, methods)

    def _budget(self) -> int | float | str:
        """The budget with its limits.

        Raises:
            ConfigError: it is none, or a limit is not one of its.
        """
        ceiling = None
        if self.max_budget is not None:
            try:
                read = known_beforehand(parse_budget(self.max_budget, self.of, BEFOREHAND))
            except ConfigError as error:
                raise ConfigError(error.problem, option="max_budget", value=self.max_budget) from None
            ceiling = read if isinstance(read, str) else self.max_budget.strip()
        if self.max_loss is not None and not 0 < self.max_loss < math.inf:
            raise ConfigError("must be a number above 0", option="max_loss", value=self.max_loss)
        return parse_budget(with_limits(self.budget, self.max_loss, ceiling), self.of)


@dataclass(frozen=True)
class Checked:
    """A request that a model can be loaded for."""

    request: Request
    context: str
    budget: int | float | str
    methods: "list[Method]"

    def load(self) -> "tuple[Any, Any, list[Method]]":
        """The model, its tokenizer, and the methods with their profiles.

        All profiles are found before the first prefill: a missing one must not cost the others' answers.
        """
        from compresskv.methods.prepare import prepare_method
        from compresskv.models.load import load

        given = self.request
        with Bar() as bar:
            model, tokenizer = load(given.model, dtype=given.dtype, device=given.device, on_progress=bar)
        profiles = [given.profile if one.needs_profile else None for one in self.methods]
        return model, tokenizer, [prepare_method(model, *pair) for pair in zip(self.methods, profiles, strict=True)]
