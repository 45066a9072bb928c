"""PyramidKV: SnapKV's choice, with budgets that shrink from the first layer to the last."""

from dataclasses import dataclass

from compresskv import budgets
from compresskv.errors import ConfigError
from compresskv.methods.snapkv import SnapKV
from compresskv.registry import register


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with linear layer budgets.

    Source: PyramidKV (arXiv 2406.02069), section 4, beta = 20.
    """

    name = "pyramidkv"
    summary = "SnapKV with more budget in early layers"
    source = "arXiv 2406.02069"

    beta: float = 20.0

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        if self.beta < 1:
            raise ConfigError(f"beta={self.beta} must be at least 1")

    def layer_budgets(self, budget: int, num_layers: int, num_tokens: int) -> list[int]:
        """Linear from deep to shallow; see `compresskv.budgets.pyramid`."""
        return budgets.pyramid(budget, num_layers, num_tokens, window_size=self.window_size, beta=self.beta)
