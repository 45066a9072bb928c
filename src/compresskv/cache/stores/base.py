"""What holds one layer's keys and values: the interface that every store implements."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compresskv.attention.plain import AttentionFunction
from compresskv.cache.stores.positions import Positions
from compresskv.selection.precision import NATIVE, PRECISIONS, Precision
from compresskv.system.memory import storage_nbytes

ROOM = 32
"""Tokens that a store gets room for when it is full: a copy of what it holds every so many tokens."""
_CUDA_ROOM = 256

EVEN, RAGGED = "even", "ragged"
"""How a store lays out what a compiled step writes to: see `Slots`."""


@dataclass(frozen=True)
class Slots:
    """Room for one more token of one row, for code that writes it by itself and then calls `advance`."""

    keys: Tensor
    """(1, H_kv, n, D), or (1, N, D) in which each KV head has a part."""
    values: Tensor
    starts: list[int]
    """Where each KV head's part begins: in the flattened (H_kv * n, D), or in N."""
    ends: list[int]
    """Where its new token goes."""
    packed: Sequence[Tensor] = ()
    """What lies before them packed and is not written to: tensors of keys, of values, and where in them each KV head's
    part begins and the last one ends, (H_kv + 1,) int64."""


class Store(ABC):
    """Keys and values of one layer, and which token each slot holds.

    What was handed out is never changed: a copy that shares it may go on reading. Keys are stored post-RoPE.
    """

    @property
    def layout(self) -> str | None:
        """`EVEN` or `RAGGED`; None where no compiled step can write into it."""
        return None

    precision: ClassVar[Precision] = PRECISIONS[NATIVE]
    """Of what was kept of a prompt."""

    def __init__(self, held: Positions) -> None:
        self.held = held

    # What is kept of a layer

    @classmethod
    @abstractmethod
    def fits(cls, held: Positions) -> bool:
        """Whether this store is meant for such a choice."""

    @classmethod
    @abstractmethod
    def gathered(cls, source: "Store", held: Positions, slots: Tensor) -> "Store":
        """A new store of what `held` names, which lies in these slots of `source`; see `Positions.choose`."""

    @abstractmethod
    def take(self, slots: Tensor, head: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv or 1, R, D) in the named slots of all KV heads, or of one.

        Args:
            slots: (B, 1 or H_kv, R), in terms of `positions`; any token for what is `EMPTY_SLOT`.
        """

    # What attention needs

    @abstractmethod
    def append(
        self, key_states: Tensor, value_states: Tensor, room: int = ROOM, *, undecided: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens (B, H_kv, T_new, D) in every head.

        Args:
            room: tokens beside the new ones that a new tensor gets room for.
            undecided: what is kept of them is chosen later: until then they stay as they are given.
        Returns: what the model hands on to its attention, which is then asked of `attend`.
        """

    @abstractmethod
    def attend(
        self, attention: AttentionFunction, module: nn.Module, query: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over what is stored: (B, T_new, H_q, D), and its weights where the function gives them.

        Args:
            attention: as in `Routed.attend`.
            query: (B, H_q, T_new, D), of the last tokens stored.
            mask: (B or 1, 1, T_new, seen), over all tokens seen; None where nothing is masked but the future.
        """

    @property
    @abstractmethod
    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, n, D) as views where all heads hold as many side by side, else with n = 0."""

    # What changes it

    def reserve(self) -> Slots:
        """Room for one token of one row.

        Raises:
            NotImplementedError: this store has no `layout`.
        """
        raise NotImplementedError

    def advance(self) -> None:
        """Count the token that was written into what `reserve` gave.

        Raises:
            NotImplementedError: this store has no `layout`.
        """
        raise NotImplementedError

    @abstractmethod
    def crop(self, num_removed: int) -> None:
        """Forget the last tokens, which came after anything was chosen."""

    @abstractmethod
    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to the rows of all that is held."""

    @abstractmethod
    def __copy__(self) -> "Store":
        """A store that goes on from here alone; tensors are shared until one of them changes."""

    def lend(self, room: int) -> "Store":
        """A store that goes on from here alone, as a copy does, and writes behind what is held in the same tensors.

        So what is held is copied for none of many that go on from here, one after the other. While one of them is in
        use, nothing else may be lent, and this one must not grow.

        Args:
            room: tokens that it may add before it needs tensors of its own.
        """
        return copy.copy(self)

    # What it holds

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that hold keys and values."""

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind them."""
        return storage_nbytes(list(self.tensors))

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return self.states[0].shape[1]

    @property
    def counts(self) -> list[int]:
        """Slots of each KV head."""
        return self.held.counts(self.num_heads)

    @property
    def positions(self) -> Tensor:
        """(B, 1 or H_kv, n) int64: the token in every slot; heads that hold fewer begin with `EMPTY_SLOT`."""
        keys = self.states[0]
        return self.held.explicit(keys.shape[0], keys.device)

    def heads(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (B, 1, n, D) of each KV head, in order of position."""
        longest = max(self.counts)
        slots = torch.arange(longest, device=self.states[0].device).expand(self.states[0].shape[0], 1, -1)
        return [self.take(slots[..., longest - count :], head) for head, count in enumerate(self.counts)]

    # What is written to a file

    def state(self) -> dict[str, Tensor]:
        """All of it as plain tensors, without room; `from_state` reads them."""
        state = {"later": torch.tensor([self.held.later.start, self.held.later.stop], device="cpu")}
        if self.held.chosen is not None:
            state |= {
                "chosen": self.held.chosen.long(),
                "fullest": torch.tensor(self.held.fullest, device="cpu"),
                "has_empty_slots": torch.tensor(self.held.has_empty_slots, device="cpu"),
            }
        return state

    @classmethod
    @abstractmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Store":
        """The store whose `state` this is."""

    @staticmethod
    def positions_from_state(state: dict[str, Tensor]) -> Positions:
        """The part of `from_state` that is alike in all stores."""
        later = range(*state["later"].tolist())
        if "chosen" not in state:
            return Positions(later)
        chosen, fullest = state["chosen"].to(torch.int32), tuple(state["fullest"].tolist())
        return Positions(later, chosen, fullest, bool(state["has_empty_slots"]))


def room_for_tokens(device: torch.device) -> int:
    """Room for single tokens that a compiled step adds: on a GPU each new tensor costs a new recording of the step."""
    return _CUDA_ROOM if device.type == "cuda" else ROOM


def may_write(storage: Tensor, states: Tensor) -> bool:
    """Whether `states` may be written into `storage` in place.

    Not where a backward pass may still need what `storage` held, nor into a tensor of an inference mode that has ended.
    """
    needs_grad = torch.is_grad_enabled() and (storage.requires_grad or states.requires_grad)
    return not needs_grad and (torch.is_inference_mode_enabled() or not storage.is_inference())


def gather_tokens(indices: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The named tokens of each (B, H, T, D): (B, H, R, D). `indices` is (B, H or 1, R); empty slots get any token."""
    batch_size, num_heads = tensors[0].shape[:2]
    rows = torch.arange(batch_size, device=indices.device)[:, None, None]
    heads = torch.arange(num_heads, device=indices.device)[:, None]
    named = indices.clamp(min=0)
    return [states[rows, heads, named] for states in tensors]
