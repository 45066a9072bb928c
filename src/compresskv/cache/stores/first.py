"""Each row's first token of a KV head, apart from the others, and among them again: empty slots come before it."""

import torch
from torch import Tensor


def first_apart(states: Tensor, empty: Tensor | None, num_first: int) -> tuple[Tensor, Tensor]:
    """Each row's first token (B, 1, ...), and all other slots (B, n - 1, ...), empty ones too, in their order.

    Args:
        states: (B, n, ...), what lies in a KV head's slots.
        empty: (B,) slots with which the row begins and that hold nothing; None: there are none.
        num_first: 1, or 0 to take none apart.
    """
    if empty is None or not num_first:
        return states[:, :num_first], states[:, num_first:]
    rows, slots = _rows_and_slots(states, states.shape[1] - 1)
    others = slots + (slots >= empty[:, None]).long()
    return states[rows, empty[:, None]], states[rows, others]


def first_among(first: Tensor, packed: Tensor, later: Tensor, empty: Tensor | None) -> Tensor:
    """(B, n, ...): what `first_apart` took apart, and `later` behind it."""
    joined = torch.cat([first, packed, later], dim=1)
    if empty is None or not first.shape[1]:
        return joined
    rows, slots = _rows_and_slots(joined, joined.shape[1])
    places = slots + (slots < empty[:, None]).long()
    return joined[rows, torch.where(slots == empty[:, None], 0, places)]


def _rows_and_slots(states: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """(B, 1) and (1, n)."""
    rows, slots = (torch.arange(number, device=states.device) for number in (len(states), num_slots))
    return rows[:, None], slots[None]
