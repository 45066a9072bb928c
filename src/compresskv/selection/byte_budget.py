"""Budgets in bytes: what all full-attention layers together may hold of a prompt, and how many tokens that is."""

import re
from dataclasses import dataclass, replace

from compresskv.errors import ConfigError
from compresskv.selection.budget_words import OF_BYTES
from compresskv.selection.precision import NATIVE
from compresskv.selection.sizes import NUMBER, find_nbytes

_SHARE = re.compile(rf"{NUMBER}\s*(%?)\s*{OF_BYTES}")


@dataclass(frozen=True)
class Costs:
    """Bytes in all full-attention layers of one model."""

    full: int
    """Of a token as the model computes it."""
    held: int
    """Of a token that is kept."""
    fixed: int = 0
    """Of what is kept beside tokens."""
    least: int = 0
    """Tokens that are kept whatever they take."""
    store: str = NATIVE
    """The one that keeps them."""

    def of_part(self, *, is_first: bool) -> "Costs":
        """Of a part of a text: it keeps a token at least, and what is kept beside tokens is the first part's."""
        return replace(self, fixed=self.fixed if is_first else 0, least=1)


@dataclass(frozen=True)
class ByteBudget:
    """A count of bytes, or a share of what the full cache of the prompt takes in the same layers."""

    text: str
    """As it was given."""
    count: float | None = None
    share: float | None = None

    def tokens(self, num_tokens: int, costs: Costs) -> int:
        """The tokens that fit: of a prompt of `num_tokens`, at most that. A share is one at least, as of tokens.

        Raises:
            ConfigError: not one fits into a count of bytes.
        """
        share = self.share or 0.0
        allowed, least = (share * num_tokens * costs.full, 1) if self.count is None else (self.count, costs.least)
        tokens = max(least, int((allowed - costs.fixed) // costs.held))
        if tokens < 1:
            where = "" if costs.store == NATIVE else f" in {costs.store}"
            problem = f"has no room for one token: that takes {costs.held + costs.fixed:,} bytes{where}"
            raise ConfigError(problem, option="budget", value=self.text)
        return min(tokens, num_tokens)


def find_byte_budget(text: str) -> ByteBudget | None:
    """'3MB', '64 KiB', '5% of bytes' or '0.05 of bytes' as a budget; None where it names no bytes.

    Raises:
        ConfigError: it names none that can be held: 0, or a share above 1.
    """
    text = text.strip()
    if (nbytes := find_nbytes(text)) is not None:
        budget = ByteBudget(text, count=nbytes)
    elif found := _SHARE.fullmatch(text):
        number, percent = found.groups()
        budget = ByteBudget(text, share=float(number) / (100 if percent else 1))
    else:
        return None
    if not (budget.count or budget.share) or (budget.share or 0) > 1:
        raise ConfigError("must be more than 0, and a share at most all", option="budget", value=text)
    return budget
