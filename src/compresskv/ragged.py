"""Keys and values of one layer whose KV heads retain different numbers of tokens: each head in tensors of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compresskv.attention import AttentionFunction
from compresskv.errors import ModelError
from compresskv.selection import UNUSED


class RaggedStore:
    """What each KV head holds. Nothing is padded to the fullest head: what a head evicts is free."""

    def __init__(self, keys: Tensor, values: Tensor, indices: Tensor) -> None:
        """Gather what each head retains.

        Args:
            keys, values: (B, H_kv, T, D), the whole prompt's.
            indices: (B, H_kv, R) int64, ascending; heads that retain fewer begin with `UNUSED` slots.
        """
        counts = _counts(indices)
        self.positions = [indices[:, head : head + 1, indices.shape[2] - count :] for head, count in enumerate(counts)]
        self.keys, self.values = (
            [gather_tokens(states[:, head : head + 1], kept) for head, kept in enumerate(self.positions)]
            for states in (keys, values)
        )

    def __copy__(self) -> "RaggedStore":
        """A store that goes on from here alone; tensors are shared until either appends."""
        copied = object.__new__(RaggedStore)
        copied.positions, copied.keys, copied.values = self.positions, list(self.keys), list(self.values)
        return copied

    @staticmethod
    def fits(indices: Tensor) -> bool:
        """Whether KV heads retain different numbers of tokens."""
        return indices.shape[1] > 1 and len(set(_counts(indices))) > 1

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store new tokens (B, H_kv, T_new, D) in every head."""
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            for head in range(len(held)):
                held[head] = torch.cat([held[head], new[:, head : head + 1]], dim=2)

    def attend(
        self,
        attention: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        mask_for: Callable[[Tensor], Tensor | None],
    ) -> tuple[Tensor, None]:
        """Attention of each KV head's query heads over what it holds, side by side: (B, T_new, H_q, D).

        Args:
            query: (B, H_q, T_new, D).
            mask_for: gives the mask for what a head stores, from its positions (B, 1, R_h).
        Raises:
            ModelError: the model's attention function has weights of its own for every head.
        """
        groups = query.shape[1] // len(self.keys)
        if hasattr(module, "sinks"):
            raise ModelError("budgets that differ between KV heads do not work for models with learned attention sinks")
        outputs = []
        for head, (keys, values, positions) in enumerate(zip(self.keys, self.values, self.positions, strict=True)):
            own = query[:, head * groups : (head + 1) * groups]
            outputs.append(attention(own, keys, values, mask_for(positions))[0])
        return torch.cat(outputs, dim=2), None

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of all that is held."""
        self.map(function)
        self.positions = [function(positions) for positions in self.positions]

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to every head's keys and values."""
        self.keys, self.values = ([function(states) for states in held] for held in (self.keys, self.values))


def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """The named tokens of (B, H, T, D): (B, H, R, D). `indices` is (B, H or 1, R); unused slots get any token."""
    return torch.take_along_dim(states, indices.clamp(min=0)[..., None], dim=2)


def _counts(indices: Tensor) -> list[int]:
    """Tokens that each KV head retains, the most of any row."""
    counts: list[int] = (indices != UNUSED).sum(dim=-1).amax(dim=0).tolist()
    return counts
