"""How a decode step reads a layer whose keys and values are packed: unpacked inside the step, and nowhere kept."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compresskv.attention.plain import AttentionFunction, scaling_of
from compresskv.cache.stores.packed_states import PackedStates
from compresskv.cache.stores.packed_vectors import PackedVectors, is_turned, rotation
from compresskv.compiled.packed_attention import is_compiled_here, packed_attention
from compresskv.compiled.step_layer import EvenLayer, additive, check_ragged, is_plain_sdpa
from compresskv.models.shape import Heads
from compresskv.selection.precision import Precision


class PackedLayer(EvenLayer):
    """What is packed, and beside it a tail of first and new tokens, (1, H_kv, T, D), that is written to."""

    def __init__(self, layer_idx: int, config: Any, *tail: Tensor, packed: list[Tensor], precision: Precision) -> None:
        """One layer of a step.

        Args:
            tail: keys, values, starts and ends of the tail, as of an even layer.
            packed: as in `Slots`; the last tensor, where each head's part begins, is missing where all are equal.
        """
        super().__init__(layer_idx, config, *tail)
        rest = iter(packed)
        num_heads = tail[0].shape[1]
        assert precision.key_bits is not None
        assert precision.value_bits is not None
        self._packed_keys = _side(rest, precision.key_bits, num_heads, are_keys=True)
        self._packed_values = _side(rest, precision.value_bits, num_heads, are_keys=False)
        self._bounds = next(rest, None)
        heads = Heads(num_heads, num_heads, tail[0].shape[-1])
        self._is_read_as_it_is = tail[0].device.type == "cpu" and is_compiled_here(heads, precision)

    def attend(
        self, attention: AttentionFunction, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """On CPUs, plain attention reads codes; elsewhere, all that is packed is unpacked for one call.

        Raises:
            ModelError: KV heads hold different numbers of tokens, and attention is not plain 'sdpa'.
        """
        if self._is_read_as_it_is and is_plain_sdpa(self._model_config, **kwargs):
            return self._attend_to_codes(query, kwargs.get("scaling")), None
        tails = self.stored()
        sides = (self._packed_keys, self._packed_values)
        slot = torch.arange(tails[0].shape[2], device=query.device)
        new = slot <= self._end
        if self._bounds is None:
            keys, values = (side.even(tail[:, :, :0], tail) for side, tail in zip(sides, tails, strict=True))
            old = torch.ones(keys.shape[2] - slot.shape[0], dtype=torch.bool, device=query.device)
            visible = torch.cat([old, new])[None, None, None]
        else:
            check_ragged(self._model_config, **kwargs)
            keys, values = (_ragged(*pair, self._bounds) for pair in zip(sides, tails, strict=True))
            column = torch.arange(sides[0].vectors.codes.shape[1], device=query.device)
            own = (column >= self._bounds[:-1, None]) & (column < self._bounds[1:, None])  # (H_kv, N)
            heads = torch.eye(len(own), dtype=torch.bool, device=query.device)
            own_tail = (heads[:, :, None] & new).flatten(1)  # (H_kv, H_kv * T)
            groups = query.shape[1] // len(own)
            visible = torch.cat([own, own_tail], dim=1).repeat_interleave(groups, dim=0)[None, :, None]
        query = self._packed_keys.turned_queries(query)
        output, weights = attention(query, keys, values, additive(visible, query.dtype))
        return self._packed_values.turned_output(output), weights

    def _attend_to_codes(self, query: Tensor, scaling: float | None) -> Tensor:
        keys, values = self._packed_keys, self._packed_values
        tails = self.stored()
        num_heads, dim = tails[0].shape[1::2]
        bounds = self._bounds
        if bounds is None:
            num_each = keys.vectors.codes.shape[1] // num_heads
            bounds = num_each * torch.arange(num_heads + 1, device=query.device)
        output: Tensor = packed_attention(
            query.float(),
            keys.vectors.codes,
            keys.vectors.ranges,
            keys.centre,
            keys.scale,
            values.vectors.codes,
            values.vectors.ranges,
            values.centre,
            rotation(dim, query.device),
            *(states.float() for states in tails),
            bounds,
            self._end,
            scaling_of(query, scaling),
        )
        return output.to(tails[0].dtype)


def example_packed(
    precision: Precision, heads: Heads, num_each: int, generator: torch.Generator, *, ragged: bool
) -> list[Tensor]:
    """Like `Slots.packed` of KV heads that hold `num_each` tokens: all numbers lie between -0.1 and 0.1."""
    packed: list[Tensor] = []
    num_heads, dim = heads.num_kv_heads, heads.head_dim
    for bits in (precision.key_bits, precision.value_bits):
        assert bits is not None
        states = (
            0.2 * torch.rand(1, num_heads * num_each, dim, generator=generator, dtype=torch.float32, device="cpu") - 0.1
        )
        own = PackedStates.of(list(states.split(num_each, dim=1)), None, bits, are_keys=not packed)
        packed += own.tensors
    if ragged:
        packed.append(num_each * torch.arange(num_heads + 1, device="cpu"))
    return packed


def _side(rest: Iterator[Tensor], bits: int, num_heads: int, *, are_keys: bool) -> PackedStates:
    """Keys or values, of the next of `PackedStates.tensors`; counts are not known here."""
    vectors = PackedVectors(next(rest), next(rest), bits)
    centre = next(rest) if is_turned(bits) else None
    scale = next(rest) if is_turned(bits) and are_keys else None
    return PackedStates(vectors, [0] * num_heads, centre, scale)


def _ragged(packed: PackedStates, tail: Tensor, bounds: Tensor) -> Tensor:
    """(1, 1, N + H_kv * T, D): all heads' parts, then all their tails."""
    states = packed.vectors.unpacked()
    if packed.centre is not None:
        column = torch.arange(states.shape[1], device=states.device)
        head = (column[:, None] >= bounds[1:-1]).sum(dim=1)
        states = states + packed.centre.float()[:, head]
    return torch.cat([states.to(tail.dtype), packed.turned_states(tail).flatten(1, 2)], dim=1)[:, None]
