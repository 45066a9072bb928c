"""What the layers of one cache decide together: budgets, the prompt's shape, and when each layer is cut."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from compresskv.budgets import Budget, check_budget
from compresskv.errors import ConfigError, PromptError
from compresskv.method import LayerInputs, Method, Observation


class Retaining(Protocol):
    """A cache layer as the eviction sees it."""

    def retain(self, indices: Tensor, scores: Tensor) -> None:
        """Keep the named prompt tokens and free all others. `scores` (B, H or 1, T) are what they were chosen by."""


class Eviction:
    """What the layers of one cache share: the method, the budget, and the prompt's shape once it is known."""

    def __init__(
        self,
        method: Method,
        budget: Budget,
        num_layers: int,
        prompt_tokens: int | None,
        on_layer: Callable[[int, int], None] | None,
    ) -> None:
        self.method = method
        self.budget = check_budget(budget)
        if not isinstance(budget, (int, float)) and len(budget) != num_layers:
            raise ConfigError(f"budget has {len(budget)} numbers, but the model has {num_layers} compressible layers")
        if prompt_tokens is not None and (not isinstance(prompt_tokens, int) or prompt_tokens < 1):
            raise ConfigError(f"prompt_tokens={prompt_tokens!r} must be an int of at least 1")
        self.num_layers = num_layers
        self.prompt_tokens = prompt_tokens
        self.on_layer = on_layer
        self._head_budgets: dict[int, list[list[int]]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the last prompt."""
        self._row_lengths: list[int] | None = None
        self._waiting: list[tuple[Retaining, Observation]] = []

    def end_of_prompt(self, layer: Retaining, position: int, inputs: LayerInputs, num_ahead: int = 0) -> None:
        """Cut the layer, now or, where the method decides for all layers together, when the last one has come.

        Args:
            num_ahead: how many of the last tokens are generated ones that the method looked ahead at. They are kept,
                beside the budget.
        """
        if position == 0:  # caches that branched off before the end of the prompt share this
            self.reset()
        row_lengths = self._note_rows(inputs)
        if min(row_lengths) == inputs.keys.shape[2]:
            inputs = replace(inputs, valid=None)
        budgets = [self._budgets(length - num_ahead, num_ahead) for length in row_lengths]  # (B, L, 1 or H)
        if all(_keeps_all(counts, row_lengths) for counts in zip(*budgets, strict=True)):
            return
        method = replace(self.method, window_size=self.method.window_size + num_ahead) if num_ahead else self.method
        if method.decides_together:
            self._waiting.append((layer, method.observe(inputs)))
            if len(self._waiting) == self.num_layers:
                self._decide(method, [list(counts) for counts in zip(*budgets, strict=True)], row_lengths)
        else:
            own = [counts[position] for counts in budgets]
            if not _keeps_all(own, row_lengths):
                self._retain(layer, method, method.score(inputs), own, row_lengths)

    def _decide(self, method: Method, budgets: list[list[list[int]]], row_lengths: list[int]) -> None:
        """Cut all layers that wait. `budgets` are (L, B, 1 or H)."""
        retaining, layers = (list(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        if isinstance(self.budget, (int, float)):  # what the caller gives for each layer is not shared out again
            means = [[counts[0] for counts in row_budgets] for row_budgets in budgets]
            shared = method.share_budgets(layers, means, row_lengths)
            budgets = [[[count] for count in counts] for counts in shared]
        scores = method.score_layers(layers)
        for layer, row_budgets, layer_scores in zip(retaining, budgets, scores, strict=True):
            if not _keeps_all(row_budgets, row_lengths):
                self._retain(layer, method, layer_scores, row_budgets, row_lengths)

    def _retain(
        self, layer: Retaining, method: Method, scores: Tensor, budgets: list[list[int]], row_lengths: list[int]
    ) -> None:
        layer.retain(method.select(scores, budgets, row_lengths), scores)

    def _budgets(self, num_tokens: int, num_ahead: int) -> list[list[int]]:
        """What each layer retains of a prompt of `num_tokens` and what came after it: one number, or one a KV head."""
        if num_tokens not in self._head_budgets:
            per_layer = self.method.resolve_budgets(self.budget, self.num_layers, num_tokens)
            self._head_budgets[num_tokens] = per_layer
        return [[count + num_ahead for count in counts] for counts in self._head_budgets[num_tokens]]

    def _note_rows(self, inputs: LayerInputs) -> list[int]:
        """The number of tokens in each row that are no padding: read from the device once a prompt.

        Raises:
            PromptError: a row's padding is not all at its left.
        """
        if self._row_lengths is None:
            batch_size, _, num_tokens, _ = inputs.keys.shape
            valid = inputs.valid
            if valid is None:
                self._row_lengths = [num_tokens] * batch_size
            else:
                lengths = valid.sum(dim=-1)
                expected = torch.arange(num_tokens, device=valid.device) >= num_tokens - lengths[:, None]
                if not torch.equal(valid, expected) or not bool(lengths.all()):
                    raise PromptError("the attention mask has padding inside or right of a prompt: pad on the left")
                self._row_lengths = lengths.tolist()
        return self._row_lengths


def _keeps_all(row_budgets: Sequence[list[int]], row_lengths: list[int]) -> bool:
    return all(min(counts) >= length for counts, length in zip(row_budgets, row_lengths, strict=True))
