"""What the layers of one cache share: the method, the budget, the prompt's shape."""

from collections.abc import Callable

import torch
from torch import Tensor

from compresskv import budgets
from compresskv.errors import ConfigError, PromptError
from compresskv.method import Method


class Eviction:
    """What the layers of one cache share: the method, the budget, and the prompt's shape once it is known."""

    def __init__(
        self,
        method: Method,
        budget: budgets.Budget,
        num_layers: int,
        prompt_tokens: int | None,
        on_layer: Callable[[int, int], None] | None,
    ) -> None:
        self.method = method
        self.budget = budgets.check_budget(budget)
        if not isinstance(budget, (int, float)) and len(budget) != num_layers:
            raise ConfigError(f"budget has {len(budget)} numbers, but the model has {num_layers} compressible layers")
        if prompt_tokens is not None and (not isinstance(prompt_tokens, int) or prompt_tokens < 1):
            raise ConfigError(f"prompt_tokens={prompt_tokens!r} must be an int of at least 1")
        self.num_layers = num_layers
        self.prompt_tokens = prompt_tokens
        self.on_layer = on_layer
        self.row_lengths: list[int] | None = None
        self._layer_budgets: dict[int, list[int]] = {}

    def reset(self) -> None:
        """Forget the last prompt."""
        self.row_lengths = None

    def layer_budget(self, position: int, num_tokens: int) -> int:
        """Tokens that the compressible layer at `position` retains of a prompt of `num_tokens`."""
        if num_tokens not in self._layer_budgets:
            if isinstance(self.budget, (int, float)):
                mean = budgets.resolve(self.budget, num_tokens)
                per_layer = self.method.layer_budgets(mean, self.num_layers, num_tokens)
            else:
                per_layer = self.method.given_budgets(self.budget, num_tokens)
            self._layer_budgets[num_tokens] = per_layer
        return self._layer_budgets[num_tokens][position]

    def note_rows(self, valid: Tensor | None, batch_size: int, num_tokens: int) -> list[int]:
        """The number of tokens in each row that are no padding: read from the device once a prompt.

        Raises:
            PromptError: a row's padding is not all at its left.
        """
        if self.row_lengths is None:
            if valid is None:
                self.row_lengths = [num_tokens] * batch_size
            else:
                lengths = valid.sum(dim=-1)
                expected = torch.arange(num_tokens, device=valid.device) >= num_tokens - lengths[:, None]
                if not torch.equal(valid, expected) or not bool(lengths.all()):
                    raise PromptError("the attention mask has padding inside or right of a prompt: pad on the left")
                self.row_lengths = lengths.tolist()
        return self.row_lengths


def valid_keys(mask: Tensor | None) -> Tensor | None:
    """(B, T) bool: the keys that the last query may attend to. It is the prompt's end, so all but padding."""
    if mask is None:
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
