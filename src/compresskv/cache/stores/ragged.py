"""Keys and values of one layer whose KV heads retain different numbers of tokens: each head in tensors of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compresskv.attention.routing import AttentionFunction
from compresskv.cache.stores.dense import ROOM, may_write, room_for_tokens
from compresskv.errors import ModelError
from compresskv.selection.select import EMPTY_SLOT


class RaggedStore:
    """What each KV head holds, one after another in one tensor. Nothing is padded to the fullest head.

    Each head's part has room for a few more tokens once it has grown, so that a new token copies none of the old ones.
    """

    def __init__(self, keys: Tensor, values: Tensor, indices: Tensor) -> None:
        """Gather what each head retains.

        Args:
            keys, values: (B, H_kv, T, D), the whole prompt's.
            indices: (B, H_kv, R) int64, ascending; heads that retain fewer begin with `EMPTY_SLOT`.
        """
        counts = _counts(indices)
        self.positions = [indices[:, head : head + 1, indices.shape[2] - count :] for head, count in enumerate(counts)]
        self.has_empty_slots = any(bool((positions == EMPTY_SLOT).any()) for positions in self.positions)
        """Whether rows of a head retain different numbers, so that some slots must be masked."""
        parts = [
            [gather_tokens(kept, states[:, head : head + 1])[0][:, 0] for head, kept in enumerate(self.positions)]
            for states in (keys, values)
        ]
        self._pack(parts, room=0)

    def _pack(self, parts: list[list[Tensor]], room: int) -> None:
        """Lay out heads' (B, n, D) side by side, each with `room` for more tokens."""
        self.counts = [part.shape[1] for part in parts[0]]
        self._starts = [sum(self.counts[:head]) + head * room for head in range(len(self.counts))]
        self._room = room
        self._keys, self._values = (self._packed(own) for own in parts)
        ends = [start + count for start, count in zip(self._starts, self.counts, strict=True)]
        self._ends = torch.tensor(ends, device=self._keys.device)
        self._shared = False

    def _packed(self, parts: list[Tensor]) -> Tensor:
        batch_size, _, head_dim = parts[0].shape
        # Zeros: a masked slot may be read, and what it holds must be a number.
        packed = parts[0].new_zeros(batch_size, sum(self.counts) + self._room * len(parts), head_dim)
        for part, start in zip(parts, self._starts, strict=True):
            packed[:, start : start + part.shape[1]] = part
        return packed

    def __copy__(self) -> "RaggedStore":
        """A store that goes on from here alone; tensors are shared until it appends."""
        copied = object.__new__(RaggedStore)
        copied.__dict__.update(self.__dict__)
        copied.counts, copied._shared = list(self.counts), True
        return copied

    @staticmethod
    def fits(indices: Tensor) -> bool:
        """Whether KV heads retain different numbers of tokens."""
        return indices.shape[1] > 1 and len(set(_counts(indices))) > 1

    @property
    def tensors(self) -> list[Tensor]:
        """(B, sum over heads of what they hold or have room for, D): keys and values."""
        return [self._keys, self._values]

    @property
    def keys(self) -> list[Tensor]:
        """(B, 1, n, D) of each head; views."""
        return self._heads(self._keys)

    @property
    def values(self) -> list[Tensor]:
        """(B, 1, n, D) of each head; views."""
        return self._heads(self._values)

    def _heads(self, packed: Tensor) -> list[Tensor]:
        places = zip(self._starts, self.counts, strict=True)
        return [packed[:, None, start : start + count] for start, count in places]

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store new tokens (B, H_kv, T_new, D) in every head."""
        num_new = key_states.shape[2]
        self._reserve(num_new, key_states, ROOM)
        for packed, states in zip(self.tensors, (key_states, value_states), strict=True):
            if num_new == 1:
                packed.index_copy_(1, self._ends, states[:, :, 0])
            else:
                for head, (start, count) in enumerate(zip(self._starts, self.counts, strict=True)):
                    packed[:, start + count : start + count + num_new] = states[:, head]
        self.advance(num_new)

    def _reserve(self, num_new: int, states: Tensor, room: int) -> None:
        """Make room for new tokens like `states` in every head's part."""
        if self._shared or num_new > self._room or not may_write(self._keys, states):
            parts = [[part[:, 0] for part in self._heads(packed)] for packed in self.tensors]
            self._pack(parts, room=num_new + room)

    def reserve_token(self) -> tuple[list[Tensor], list[int], list[int]]:
        """Room for one more token in every head's part, as in `CompressedLayer.reserve_token`."""
        self._reserve(1, self._keys, room_for_tokens(self._keys.device))
        return (
            self.tensors,
            self._starts,
            [start + count for start, count in zip(self._starts, self.counts, strict=True)],
        )

    def advance(self, num_new: int) -> None:
        """Count tokens that were written behind the parts' ends."""
        self._ends = self._ends + num_new
        self._room -= num_new
        self.counts = [count + num_new for count in self.counts]

    def crop(self, num_removed: int) -> None:
        """Forget the last tokens of every head. Their slots are not written again: a branch may still read them."""
        self.counts = [count - num_removed for count in self.counts]
        self._shared = True

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
        self.positions = [function(positions) for positions in self.positions]
        self._pack([[function(part[:, 0]) for part in self._heads(packed)] for packed in self.tensors], room=0)


def gather_tokens(indices: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The named tokens of each (B, H, T, D): (B, H, R, D). `indices` is (B, H or 1, R); unused slots get any token."""
    batch_size, num_heads = tensors[0].shape[:2]
    rows = torch.arange(batch_size, device=indices.device)[:, None, None]
    heads = torch.arange(num_heads, device=indices.device)[:, None]
    named = indices.clamp(min=0)
    return [states[rows, heads, named] for states in tensors]


def _counts(indices: Tensor) -> list[int]:
    """Tokens that each KV head retains, the most of any row."""
    counts: list[int] = (indices != EMPTY_SLOT).sum(dim=-1).amax(dim=0).tolist()
    return counts
