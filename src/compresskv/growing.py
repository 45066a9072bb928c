"""Tensors that grow along tokens: room for more is taken at once, so that a new token costs no copy of the old ones."""

import torch
from torch import Tensor

ROOM = 32
"""Tokens that a tensor gets room for when it is full: a copy of what it holds every so many tokens."""


class Growing:
    """Keys or values of one layer, (B, H, n, D), at the front of a tensor with room for more.

    What was handed out is never changed: a branch that shares it may go on reading. So whoever shares or cuts what is
    held must make a new `Growing` of it, whose first token copies.
    """

    def __init__(self, held: Tensor) -> None:
        self._held = held
        self._storage: Tensor | None = None

    def append(self, states: Tensor) -> Tensor:
        """Add (B, H, T_new, D) and return all that is held, a view."""
        start, end = self._held.shape[2], self._held.shape[2] + states.shape[2]
        if self._storage is None or end > self._storage.shape[2] or not may_write(self._storage, states):
            batch_size, num_heads, _, head_dim = states.shape
            self._storage = self._held.new_empty(batch_size, num_heads, end + ROOM, head_dim)
            self._storage[:, :, :start] = self._held
        self._storage[:, :, start:end] = states
        self._held = self._storage[:, :, :end]
        return self._held

    @property
    def held(self) -> Tensor:
        """(B, H, n, D)."""
        return self._held


def may_write(storage: Tensor, states: Tensor) -> bool:
    """Whether `states` may be written into `storage` in place.

    Not where a backward pass may still need what `storage` held, nor into a tensor of an inference mode that has ended.
    """
    needs_grad = torch.is_grad_enabled() and (storage.requires_grad or states.requires_grad)
    return not needs_grad and (torch.is_inference_mode_enabled() or not storage.is_inference())
