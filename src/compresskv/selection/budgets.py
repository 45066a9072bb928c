"""How many tokens each layer retains. Every function returns one number a layer, whose sum is exact.

A budget `b` is a number of tokens retained per KV head per layer, window included; L layers share b * L.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

from compresskv.errors import ConfigError
from compresskv.selection.auto_budget import as_typed, find_auto_budget
from compresskv.selection.budget_words import ANY, IN_TOKENS, OF_BYTES, any_of
from compresskv.selection.byte_budget import Costs, find_byte_budget

Budget = int | float | str | Sequence[int]
"""A count of tokens (256), a fraction of the prompt (0.03), bytes as text ('3MB', '5% of bytes'), one count a layer
([64, 128, ...]), or what each prompt decides ('auto', 'auto[max_loss=0.05,at_most=25%]')."""
SharedBudget = int | float | str
"""One for all layers."""
B = TypeVar("B", bound=Budget)
TOKENS, BYTES = "tokens", "bytes"
"""What a share on the command line may be of."""


def check_budget(budget: Budget, num_layers: int | None = None) -> Budget:
    """Return `budget` unchanged where it can work.

    Args:
        num_layers: the model's full-attention layers, where the model is known.
    Raises:
        ConfigError: not one count for each of `num_layers`, below 1 token, a fraction outside (0, 1], text that names
            no bytes, or neither a number nor a sequence of whole numbers.
            NumPy's and PyTorch's numbers are refused, so that a budget has one type in results and in JSON.
    """
    if isinstance(budget, str):
        if find_byte_budget(budget) is None and not is_auto(budget):
            problem = "is text, and names no bytes ('3MB', '5% of bytes'): give tokens or a share as a number"
            raise ConfigError(problem, option="budget", value=budget)
        return budget
    if isinstance(budget, (bool, bytes, bytearray)) or not isinstance(budget, (int, float, Sequence)):
        shown = " ".join(repr(budget).split())  # arrays print on several lines
        raise ConfigError(
            f"budget={shown} is a {type(budget).__name__}: give tokens as int(...), a share of the prompt as "
            "float(...), or a list of one int for each layer"
        )
    if isinstance(budget, int):
        if budget < 1:
            raise ConfigError("must be at least 1 token", option="budget", value=budget)
    elif isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ConfigError(
                f"is no share of the prompt, above 0 and at most 1.0: give {any_of(*IN_TOKENS)}",
                option="budget",
                value=budget,
            )
    elif not budget:
        raise ConfigError("is empty: give one int for each layer", option="budget", value=budget)
    else:
        for layer, count in enumerate(budget):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(f"budget holds {count!r} for layer {layer}: give an int of at least 1 for each layer")
        if num_layers is not None and len(budget) != num_layers:
            raise ConfigError(f"budget has {len(budget)} numbers, but the model has {num_layers} compressible layers")
    return budget


def read_budget(budget: Budget, kinds: Sequence[str] = ANY) -> Budget:
    """What callers give: text as on the command line ('15%', '256', '3MB') is read, all else is checked.

    Args:
        kinds: as for `parse_budget`.
    Raises:
        ConfigError: as `parse_budget` and `check_budget`.
    """
    return parse_budget(budget, kinds=kinds) if isinstance(budget, str) else check_budget(budget)


def is_auto(budget: Budget | None) -> bool:
    """Whether each prompt decides it.

    Raises:
        ConfigError: it does, but by what cannot be.
    """
    if not isinstance(budget, str) or (auto := find_auto_budget(budget)) is None:
        return False
    if auto.at_most is not None:
        try:
            ceiling = parse_budget(auto.at_most)
        except ConfigError as error:
            raise ConfigError(f"has a ceiling that {error.problem}", option="budget", value=budget) from None
        if is_auto(ceiling):
            raise ConfigError("has a ceiling that is none itself", option="budget", value=budget)
    return True


def known_beforehand(budget: B, option: str = "budget") -> B:
    """Return `budget` unchanged where no prompt must be read to know it.

    Raises:
        ConfigError: each prompt decides it.
    """
    if is_auto(budget):
        problem = "depends on each prompt, which cannot be here: give tokens, a share of the prompt, or bytes"
        raise ConfigError(problem, option=option, value=as_typed(budget))
    return budget


def in_tokens(budget: SharedBudget, option: str = "budget") -> int | float:
    """Return `budget` unchanged where it says by itself how many tokens it is.

    Raises:
        ConfigError: as `check_budget`; or it is in bytes, or each prompt decides it.
    """
    known_beforehand(check_budget(budget), option)
    if isinstance(budget, str):
        raise ConfigError("is in bytes: give tokens, or a share of the prompt", option=option, value=budget)
    return budget


def budget_order(budget: SharedBudget | None) -> tuple[int, float]:
    """By which budgets are sorted: none, fractions, counts of tokens, shares of bytes, bytes, allowed losses."""
    if budget is None:
        return 0, 0.0
    if isinstance(budget, str):
        if (auto := find_auto_budget(budget)) is not None:
            return 5, auto.max_loss
        found = find_byte_budget(budget)
        assert found is not None
        return (3, found.share) if found.share else (4, found.count or 0)
    return (2 if isinstance(budget, int) else 1), budget


def is_shared(budget: Budget) -> bool:
    """Whether it is one for all layers, which a method may share out among them."""
    return isinstance(budget, (int, float, str))


def is_share(budget: Budget) -> bool:
    """Whether it is a share of the prompt, in tokens or bytes: parts of a prompt then have theirs, whatever follows."""
    if isinstance(budget, str):
        found = find_byte_budget(budget)
        return found is not None and found.share is not None
    return isinstance(budget, float)


def of_part(budget: Budget, num_tokens: int, total: int) -> Budget:
    """The budget of a part, of one for a prompt of `total` tokens."""
    if num_tokens == total or is_share(budget):
        return budget
    if isinstance(budget, str):
        found = find_byte_budget(budget)
        assert found is not None
        return f"{max(1, int((found.count or 0) * num_tokens / total))}B"
    if isinstance(budget, (int, float)):
        return max(1, int(budget) * num_tokens // total)
    return [max(1, count * num_tokens // total) for count in budget]


def as_json(budget: Budget) -> int | float | str | list[int]:
    """The same in one of JSON's types."""
    return budget if isinstance(budget, (int, float, str)) else list(budget)


def parse_budget(text: str, of: str = TOKENS, kinds: Sequence[str] = ANY) -> int | float | str:
    """Read a budget as people type it: '256', '0.03', '3%', '3MB', or 'auto'.

    Args:
        of: what a share is of: the prompt's tokens, or the bytes of its full cache.
        kinds: what an error says can be given; the caller refuses the others.
    Raises:
        ConfigError: not one of these, or out of range; with the value as it was typed.
    """
    if of not in (TOKENS, BYTES):
        raise ConfigError(f"must be {TOKENS} or {BYTES}", option="of", value=of)
    text = text.strip()
    if (auto := find_auto_budget(text)) is not None:
        is_auto(text)
        return auto.text
    if (in_bytes := find_byte_budget(text)) is not None:
        return in_bytes.text
    if of == BYTES:
        in_bytes = None
        with suppress(ConfigError):  # which would name it with the words put behind it
            in_bytes = find_byte_budget(f"{text} {OF_BYTES}")
        if in_bytes is None:
            problem = f"is no share (3%): with of={BYTES}, it is one of the full cache's bytes"
            raise ConfigError(problem, option="budget", value=text)
        return in_bytes.text
    try:
        if text.endswith("%"):
            value: int | float = float(text[:-1]) / 100
        else:
            value = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(
            f"is no budget: give {any_of(*kinds)}",
            option="budget",
            value=text,
        ) from None
    try:
        check_budget(value)
    except ConfigError as error:
        raise ConfigError(error.problem, option=error.option, value=text) from None
    return value


def resolve(budget: int | float, num_tokens: int) -> int:
    """Tokens to retain of a prompt: a fraction is rounded to the nearest whole token, and is at least 1."""
    if isinstance(budget, int):
        return min(budget, num_tokens)
    return min(num_tokens, max(1, math.floor(budget * num_tokens + 0.5)))


def resolve_shared(budget: SharedBudget, num_tokens: int, costs: Costs | None) -> int:
    """As `resolve`, of budgets in bytes, too.

    Args:
        costs: what tokens take; None only where the budget is in tokens.
    Raises:
        ConfigError: no token fits into the bytes.
    """
    if isinstance(budget, str):
        in_bytes = find_byte_budget(budget)
        assert in_bytes is not None
        assert costs is not None
        return in_bytes.tokens(num_tokens, costs)
    return resolve(budget, num_tokens)
