"""Keep everything: the reference that the others are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from compresskv.methods.base import Method
from compresskv.methods.registry import register


@register
@dataclass(frozen=True)
class Full(Method):
    """The uncompressed cache; the budget is ignored and nothing is ever scored."""

    name = "full"
    summary = "keeps every token"
    source = "-"
    evicts = False

    def layer_budgets(self, budget: int, num_layers: int, num_tokens: int) -> list[int]:
        """The whole prompt in every layer."""
        return [num_tokens] * num_layers

    def given_budgets(self, counts: Sequence[int], num_tokens: int) -> list[int]:
        """The whole prompt in every layer, whatever is given."""
        return [num_tokens] * len(counts)
