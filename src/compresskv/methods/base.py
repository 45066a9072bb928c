"""What a compression method is: scores for tokens, and budgets for layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from compresskv.errors import ConfigError
from compresskv.methods.inputs import LayerInputs, Observation
from compresskv.methods.ranges import Range, ranges
from compresskv.selection import budgets, sharing
from compresskv.selection.auto_budget import LossCurve
from compresskv.selection.select import select, select_rows

if TYPE_CHECKING:
    from torch import Tensor

    from compresskv.profiles.profile import Profile


@dataclass(frozen=True)
class Method:
    """Base of every method. A subclass is a frozen dataclass in one file: class attributes, options as fields, `score`.

    How a prompt is cut: `head_budgets` says how many tokens each layer keeps, `score` what each token is worth, and
    `select` which are kept. Methods that need all layers for that set `decides_together`: `observe` says what each
    layer tells the others, and `score_layers` and `share_budgets` decide from that.

    The most recent `window_size` tokens are always kept; their scores are ignored. With `lookahead`, the cut waits for
    as many decode steps, whose queries join the window: the method then sees a `window_size` and a budget that are
    larger by that number.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs_profile: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    """Whether any budget makes the method leave tokens out."""
    decides_together: ClassVar[bool] = False
    """Whether a layer's choice waits for all layers: candidates for it are then held until prefill ends, or all."""
    observes_all: ClassVar[bool] = False
    """Whether `LayerInputs.query_window` holds the queries of the whole prompt, not those of the window alone."""
    turns_back: ClassVar[bool] = False
    """Whether the method needs `LayerInputs.rotation`."""
    turns_ahead: ClassVar[bool] = False
    """Whether the method needs `LayerInputs.ahead`."""
    replays: ClassVar[bool] = False
    """Whether the text is read once more, right after itself, for `LayerInputs.replayed`. Who reads the prompt must
    know its token ids for that: `make_plan`, `ask` and evaluations do, `compressing` does not."""
    shares_positions: ClassVar[bool] = False
    """Whether all layers and KV heads keep the same tokens, the one form that fits an engine with one block table for
    all layers. Such a method scores by queries and keys alone."""
    shares_heads: ClassVar[bool] = False
    """Whether all KV heads of a layer keep the same tokens, chosen by some of its query heads."""

    general_loss: ClassVar[LossCurve | None] = None
    """What is lost at a coverage of attention, at most on most models; None where that was not measured. Only a method
    that `decides_together` can have one: it looks at all layers before anything is evicted."""
    brings_budget: ClassVar[bool] = False
    """Whether the method knows by itself how many tokens it keeps."""

    ours: ClassVar[bool] = False
    """Whether reports compare it with the best of the others, as a method of this project's."""

    limits: ClassVar[Mapping[str, Range]] = ranges(
        window_size=Range(0), lookahead=Range(0), kernel_size=Range(1, odd=True)
    )
    """What options may be. A subclass names what it adds or narrows; the rest is inherited."""

    window_size: int = 0
    lookahead: int = field(default=0, kw_only=True)
    """Decode steps with the full cache before anything is evicted."""

    def __post_init__(self) -> None:
        """Validate the options where they are given.

        Raises:
            ConfigError: naming the option and its value.
        """
        limits: dict[str, Range] = {}
        for kind in reversed(type(self).__mro__):
            limits |= vars(kind).get("limits", {})
        for name, kind in option_types(type(self)).items():
            value = getattr(self, name)
            if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError("must be an int", option=name, value=value)
            if kind is bool and not isinstance(value, bool):
                raise ConfigError("must be true or false", option=name, value=value)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if kind is float and not is_number:
                raise ConfigError("must be a finite number", option=name, value=value)
            limit = limits.get(name)
            if limit is not None and (problem := limit.problem(value)) is not None:
                raise ConfigError(problem, option=name, value=value)

    @property
    def label(self) -> str:
        """The method's name, with the options that differ from its defaults: 'snapkv[window_size=32]'."""
        changed = [
            f"{name}={getattr(self, name)}"
            for name, default in option_defaults(type(self)).items()
            if getattr(self, name) != default
        ]
        return f"{self.name}[{','.join(changed)}]" if changed else self.name

    def with_profile(self, profile: Profile) -> Method:
        """The same method with a model's measurements. Only methods with `needs_profile` take one.

        Raises:
            ConfigError: this is no such method.
        """
        raise ConfigError(f"method {self.name!r} takes no profile")

    def loss_curve(self) -> LossCurve | None:
        """What is lost at a coverage of attention, by which an automatic budget is chosen; None where nobody knows.

        The model's own, where its profile holds one, else the general one.
        """
        profile: Profile | None = getattr(self, "profile", None)
        own = None if profile is None else profile.loss_curves.get(self.name)
        return self.general_loss if own is None else LossCurve(*own)

    def window_at(self, budget: int) -> int:
        """The observation window at a mean budget of `budget` tokens, at most `window_size`."""
        return self.window_size

    def told_budget(self, budget: budgets.Budget) -> int | float | str | list[int] | None:
        """A budget in one of JSON's types; None where the method evicts nothing, whatever it is given."""
        return budgets.as_json(budget) if self.evicts else None

    @property
    def cuts_again(self) -> bool:
        """Whether the method can choose among tokens of which others were evicted before."""
        return not (self.observes_all or self.turns_back or self.replays or self.lookahead)

    def num_observed(self, num_ahead: int = 0) -> int:
        """How many of the last queries the method looks at, where `num_ahead` tokens are looked ahead at."""
        return sys.maxsize if self.observes_all else self.window_size + num_ahead

    def with_window(self, window_size: int) -> Method:
        """The same method with another window."""
        return self if window_size == self.window_size else replace(self, window_size=window_size)

    def layer_budgets(self, budget: int, num_layers: int, num_tokens: int) -> list[int]:
        """Tokens to retain in each compressible layer; the sum is min(budget, num_tokens) * num_layers."""
        return sharing.uniform(budget, num_layers, num_tokens)

    def head_budgets(self, budget: int, num_layers: int, num_tokens: int) -> list[list[int]]:
        """For each compressible layer, one number for all its KV heads, or one number for each of them."""
        return [[count] for count in self.layer_budgets(budget, num_layers, num_tokens)]

    def given_budgets(self, counts: Sequence[int], num_tokens: int) -> list[int]:
        """Tokens to retain in each compressible layer where the caller gives one count a layer."""
        return [min(count, num_tokens) for count in counts]

    def resolve_budgets(self, budget: budgets.Budget, num_layers: int, num_tokens: int) -> list[list[int]]:
        """`head_budgets` or `given_budgets`, as the caller's `budget` asks for."""
        if isinstance(budget, (int, float)):  # bytes have become tokens
            return self.head_budgets(budgets.resolve(budget, num_tokens), num_layers, num_tokens)
        assert not isinstance(budget, str)
        return [[count] for count in self.given_budgets(budget, num_tokens)]

    def reads_layer(self, layer_idx: int) -> bool:
        """Whether `observe` or `score` looks at this layer's queries and keys at all."""
        return True

    def score(self, inputs: LayerInputs) -> Tensor:
        """How much each prompt token is worth keeping.

        Returns: (B, H_kv, T) float32, or (B, 1, T) where all KV heads of the layer share one choice.
        """
        raise NotImplementedError

    def observe(self, inputs: LayerInputs) -> Observation:
        """What the layer tells the others, for methods that `decides_together`: its scores, or what they need."""
        return Observation(inputs.layer_idx, inputs.valid, scores=self.score(inputs))

    def candidate_scores(self, layers: Sequence[Observation]) -> Tensor | None:
        """How likely the last of `layers` keeps each token in the end, where layers after it have not been read.

        So the layer may free all but the likeliest. Sinks that are always kept must be first here, too.

        Returns: (B, H, T), with as many heads as `score_layers` gives; None where that cannot be told, and everything
            must be held.
        """
        return layers[-1].scores

    def score_layers(self, layers: Sequence[Observation]) -> list[Tensor]:
        """Scores of all layers at once, (B, H_kv or 1, T) each, for methods that `decides_together`."""
        return [layer.scores for layer in layers if layer.scores is not None]

    def share_budgets(
        self, layers: Sequence[Observation], budgets: list[list[int]], row_lengths: list[int]
    ) -> list[list[int]]:
        """Budgets that only the prompt tells, for methods that `decides_together`.

        Args:
            budgets: (L, B) tokens that each layer would retain of each row.
        Returns: (L, B), each row with the same sum over layers.
        """
        return budgets

    def share_heads(
        self, layers: Sequence[Observation], budgets: list[list[int]], row_lengths: list[int]
    ) -> list[list[list[int]]]:
        """`share_budgets`, for methods in which KV heads of all layers share.

        Returns: (L, B, 1 or H_kv): one number for all KV heads of a layer, or one for each of them.
        """
        return [[[count] for count in rows] for rows in self.share_budgets(layers, budgets, row_lengths)]

    def select(self, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]) -> Tensor:
        """The tokens that one layer keeps; see `compresskv.selection.select.select_rows`."""
        num_tokens = scores.shape[2]
        if min(row_lengths) == num_tokens and all(counts == budgets[0][:1] for counts in budgets):
            return select(scores, budgets[0][0], self.window_size)
        return select_rows(scores, budgets, self.window_size, row_lengths)


def option_types(method: type[Method]) -> Mapping[str, type]:
    """int, float or bool for each option of a method: what can be typed. Other fields, such as a profile, are none.

    Types are looked up where their class stands: files with `from __future__ import annotations` hold their text alone.
    """
    kind: Any = method  # a dataclass's own class is hashable, which type checkers doubt
    return _option_types(kind)


@cache
def _option_types(method: Any) -> Mapping[str, type]:
    found = {option.name: _resolved(method, option) for option in fields(method)}
    return MappingProxyType({name: kind for name, kind in found.items() if kind in (int, float, bool)})


def option_defaults(method: type[Method]) -> dict[str, int | float | bool]:
    """The default of each option of a method."""
    return {name: getattr(method, name) for name in option_types(method)}


def _resolved(method: type[Method], option: Field[Any]) -> Any:
    if not isinstance(option.type, str):
        return option.type
    owner = next(kind for kind in method.__mro__ if option.name in vars(kind).get("__annotations__", {}))
    alone = SimpleNamespace(__annotations__={option.name: option.type})
    try:
        return get_type_hints(alone, globalns=vars(sys.modules[owner.__module__]))[option.name]
    except NameError:  # imported for type checkers only: no number
        return None
