"""Tensors that grow along tokens: room for more is taken at once, so that a new token costs no copy of the old ones."""

import torch
from torch import Tensor

ROOM = 32
"""Tokens that a tensor gets room for when it is full: a copy of what it holds every so many tokens."""
_CUDA_ROOM = 256


def room_for_tokens(device: torch.device) -> int:
    """Room for single tokens that a compiled step adds: on a GPU each new tensor costs a new recording of the step."""
    return _CUDA_ROOM if device.type == "cuda" else ROOM


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
        start, num_new = self._held.shape[2], states.shape[2]
        self.reserve(num_new, states, ROOM)[:, :, start : start + num_new] = states
        return self.advance(num_new)

    def reserve(self, num_new: int, states: Tensor, room: int) -> Tensor:
        """A tensor (B, H, n + room, D) that begins with what is held and has room for new tokens like `states`.

        Args:
            room: tokens beside the new ones that a new tensor gets room for.
        """
        held = self._held.shape[2]
        if self._storage is None or held + num_new > self._storage.shape[2] or not may_write(self._storage, states):
            batch_size, num_heads, _, head_dim = self._held.shape
            self._storage = self._held.new_empty(batch_size, num_heads, held + num_new + room, head_dim)
            self._storage[:, :, :held] = self._held
            self._storage[:, :, held:] = 0  # a masked slot may be read, and what it holds must be a number
        return self._storage

    def advance(self, num_new: int) -> Tensor:
        """Count tokens that were written into what `reserve` gave; all that is held then, a view."""
        assert self._storage is not None
        self._held = self._storage[:, :, : self._held.shape[2] + num_new]
        return self._held

    @property
    def held(self) -> Tensor:
        """(B, H, n, D)."""
        return self._held


class DenseStore:
    """Keys and values of one layer, whose KV heads hold equal numbers of tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._growing = Growing(keys), Growing(values)

    def holds(self, keys: Tensor) -> bool:
        """Whether `keys` are what is held: it may have been cut or rearranged since."""
        return self._growing[0].held is keys

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, H_kv, T_new, D) and return all that is held, views."""
        keys, values = self._growing
        return keys.append(key_states), values.append(value_states)

    def reserve_token(self) -> tuple[list[Tensor], list[int], list[int]]:
        """Room for one more token, as in `CompressedLayer.reserve_token`."""
        keys, values = (
            growing.reserve(1, growing.held, room_for_tokens(growing.held.device)) for growing in self._growing
        )
        num_slots, held = keys.shape[2], self._growing[0].held.shape[2]
        starts = [head * num_slots for head in range(keys.shape[1])]
        return [keys, values], starts, [start + held for start in starts]

    def advance(self) -> tuple[Tensor, Tensor]:
        """Count the token that was written into what `reserve_token` gave; all that is held then, views."""
        keys, values = self._growing
        return keys.advance(1), values.advance(1)


def may_write(storage: Tensor, states: Tensor) -> bool:
    """Whether `states` may be written into `storage` in place.

    Not where a backward pass may still need what `storage` held, nor into a tensor of an inference mode that has ended.
    """
    needs_grad = torch.is_grad_enabled() and (storage.requires_grad or states.requires_grad)
    return not needs_grad and (torch.is_inference_mode_enabled() or not storage.is_inference())
