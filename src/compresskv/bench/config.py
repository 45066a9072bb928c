"""What a run measures: lengths, methods, budgets, and how often."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from compresskv.bench.contender import COMPILED, EAGER, INT8, Contender, Ours, Plain
from compresskv.errors import ConfigError
from compresskv.evaluation.configurations import parse_budgets
from compresskv.evaluation.records import config_name
from compresskv.methods.base import Method
from compresskv.methods.registry import create
from compresskv.selection.budget_words import BEFOREHAND
from compresskv.selection.budgets import SharedBudget, check_budget, known_beforehand, resolve_shared
from compresskv.selection.byte_budget import Costs
from compresskv.selection.precision import NATIVE, PRECISIONS
from compresskv.system.check import check_known, check_least

FULL = "full"
DEFAULT_LENGTHS = (1024, 4096, 8192)


@dataclass(frozen=True)
class BenchConfig:
    """Everything that a user chooses but for the model."""

    lengths: tuple[int, ...]
    """Prompt lengths in tokens."""
    budgets: tuple[SharedBudget, ...]
    """Tokens, shares of the prompt, or bytes."""
    has_full: bool
    """Whether our cache that keeps all is measured, too."""
    repeats: int
    """Rounds at each length."""
    new_tokens: int
    """Generated after each prompt."""
    decode: tuple[str, ...] = (EAGER,)
    """How our caches' tokens are generated, each by all of these ways."""
    stores: tuple[str, ...] = (NATIVE,)
    """In how many bits a number our caches hold what they keep, each in all of these; see `compressing`."""

    def __post_init__(self) -> None:
        """Check that it can be run.

        Raises:
            ConfigError: naming the option and its value.
        """
        if not self.lengths:
            problem = "names no number: give prompt lengths in tokens, such as 1024,4096"
            raise ConfigError(problem, option="lengths", value=self.lengths)
        for length in self.lengths:
            check_least("lengths", length)
        for budget in self.budgets:
            known_beforehand(check_budget(budget), "budgets")
        check_least("repeats", self.repeats)
        for store in self.stores or ("",):
            check_known("stores", store, PRECISIONS)
        for way in self.decode or ("",):
            check_known("decode", way, (EAGER, COMPILED, INT8))
        if self.new_tokens < 2:
            problem = "must be at least 2: the first is part of the prefill"
            raise ConfigError(problem, option="new_tokens", value=self.new_tokens)

    @property
    def counts(self) -> tuple[int, ...]:
        """Those budgets that are counts of tokens, ascending."""
        return tuple(sorted(budget for budget in self.budgets if isinstance(budget, int)))

    @property
    def most_tokens(self) -> int:
        """The longest prompt with what is generated after it."""
        return max(self.lengths) + self.new_tokens

    def fitted(self, context: int | None, *, strict: bool) -> "BenchConfig":
        """The same for a model of that context length: the longest prompt may be cut to make room for what follows it.

        Args:
            strict: whether a longer length is refused; else it is left out.
        Raises:
            ConfigError: naming the first length that does not fit, or the answer's, which leaves no room for any.
        """
        if context is None:
            return self
        room = context - self.new_tokens
        if room < 1:
            problem = f"leaves no room in the model's context of {context} tokens"
            raise ConfigError(problem, option="new_tokens", value=self.new_tokens)
        too_long = [length for length in self.lengths if length > context]
        if (too_long and strict) or len(too_long) == len(self.lengths):
            problem = (
                f"does not fit into the model's context of {context} tokens: choose a shorter one, or a geometry of "
                "the same size with random weights"
            )
            raise ConfigError(problem, option="lengths", value=too_long[0])
        return replace(self, lengths=tuple(min(length, room) for length in self.lengths if length <= context))

    def changes(self, fitted: "BenchConfig") -> list[str]:
        """What `fitted` did to this config, one line each."""
        return [
            f"prompts of {length:,} tokens are cut to {cut:,}: the model's context holds the answer, too"
            for length, cut in zip(self.lengths, fitted.lengths, strict=False)
            if cut < length
        ]


@dataclass(frozen=True)
class Stage:
    """Contenders that take turns at one length. The first is plain transformers on the whole prompt."""

    length: int
    contenders: tuple[Contender, ...]

    def place_of_short(self, budget: SharedBudget | None) -> int | None:
        """Which contender is plain transformers on a prompt of `budget` tokens; None: there is none."""
        for place, one in enumerate(self.contenders):
            if isinstance(one, Plain) and one.max_prompt is not None and one.max_prompt == budget:
                return place
        return None


def parse_bench_budgets(text: str) -> tuple[tuple[SharedBudget, ...], bool]:
    """'128,3%,3MB,full' as budgets, and whether 'full' is among them.

    Raises:
        ConfigError: one is neither.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    counted = [part for part in parts if part != FULL]
    budgets = parse_budgets(",".join(counted) or text, kinds=(*BEFOREHAND, FULL)) if counted or not parts else ()
    return tuple(known_beforehand(budget, "budgets") for budget in budgets), FULL in parts


def stages(
    config: BenchConfig, compressed: Callable[[SharedBudget], Sequence[Contender]], full: Sequence[Contender] = ()
) -> list[Stage]:
    """One for each length, then one for each budget, with a prompt of just that many tokens.

    Beside the contenders at a budget of b tokens stands plain transformers on a prompt of b tokens.
    """
    always = [Plain(), *full]
    found = []
    for length in sorted(set(config.lengths)):
        short = [Plain(max_prompt=count) for count in config.counts if count < length]
        own = [one for budget in config.budgets for one in compressed(budget)]
        found.append(Stage(length, (*always, *own, *short)))
    for count in config.counts:
        if count not in config.lengths and count < max(config.lengths):
            found.append(Stage(count, (*always, *compressed(count))))
    return found


def our_stages(
    config: BenchConfig, methods: Mapping[str, Method], int8_model: Callable[[], PreTrainedModel] | None = None
) -> list[Stage]:
    """With our methods, by their labels; 'full' among them is not given a budget.

    Args:
        int8_model: gives the model with 8-bit weights, where the config asks for one.
    """
    evicting = {label: method for label, method in methods.items() if method.name != FULL}
    has_full = config.has_full or len(evicting) < len(methods)
    models = {way: int8_model() if way == INT8 and int8_model is not None else None for way in config.decode}

    def by_all_ways(one: Ours) -> list[Contender]:
        return [
            replace(one, method=config_name(one.method, None, "aware", store), store=store, decode=way, model=model)
            for store in config.stores
            for way, model in models.items()
        ]

    def compressed(budget: SharedBudget) -> list[Contender]:
        return [way for label, method in evicting.items() for way in by_all_ways(Ours(label, method, budget))]

    return stages(config, compressed, by_all_ways(Ours(FULL, create(FULL), None)) if has_full else ())


def within_budget(budget: SharedBudget | None, num_tokens: int, costs: Costs | None = None) -> bool:
    """Whether a budget keeps all of a prompt; `costs` as for `resolve_shared`."""
    return budget is not None and resolve_shared(budget, num_tokens, costs) >= num_tokens
