"""A decoder's rotary position embedding, as tensors that need no model."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskv.models.place import input_device
from compresskv.models.shape import decoder_config, heads_of
from compresskv.selection.rotation import AHEAD, Rotation, Turns


class Rotations:
    """A model's rotations, for the layers of one cache: those of one kind share theirs. Copies are the thing itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known: dict[tuple[Any, ...], Rotation | None] = {}
        self._turns: dict[tuple[Any, ...], Turns | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rotations":
        """Itself: a copy would take the model along."""
        return self

    def of(self, layer_idx: int, num_positions: int, device: torch.device) -> Rotation | None:
        """See `rotation_of`; on the layer's device. Those of the last prompt's length are kept."""
        key = (*self._kind(layer_idx), device, num_positions)
        if key not in self._known:
            self._known = {known: one for known, one in self._known.items() if known[-1] == num_positions}
            found = rotation_of(self._model, layer_idx, torch.arange(num_positions, device="cpu"))
            self._known[key] = None if found is None else found.to(device)
        return self._known[key]

    def ahead(
        self, layer_idx: int, num_read: int, keys: Tensor, valid: Tensor | None = None
    ) -> tuple[Rotation, ...] | None:
        """For each row, how queries are turned that come `AHEAD` of its last token; see `rotation_of`.

        Some models turn otherwise in long texts: this goes by the turns of the text as it is now.

        Args:
            num_read: tokens that were read, padding among them.
            keys: (B, ...), or other states on the device where the rotations are wanted.
            valid: (B, num_read) bool, False at padding; None where nothing is padded.
        """
        kind = (*self._kind(layer_idx), num_read)
        if kind not in self._turns:
            found = rotation_of(self._model, layer_idx, torch.tensor([1, num_read - 1], device="cpu"))
            self._turns = {known: one for known, one in self._turns.items() if known[-1] == num_read}
            self._turns[kind] = None if found is None else Turns.told_by(found)
        turns = self._turns[kind]
        if turns is None:
            return None
        lengths = [num_read] * len(keys) if valid is None else valid.sum(dim=-1).tolist()
        offsets = torch.tensor(AHEAD, device="cpu") - 1
        rows = {length: turns.at(length + offsets).to(keys.device) for length in set(lengths)}
        return tuple(rows[length] for length in lengths)

    def _kind(self, layer_idx: int) -> tuple[Any, ...]:
        """Layers of one kind turn alike."""
        config = decoder_config(self._model)
        return (getattr(config, "layer_types", None) or {layer_idx: None})[layer_idx], heads_of(config, layer_idx)


@torch.no_grad()
def rotation_of(model: PreTrainedModel, layer_idx: int, positions: Tensor) -> Rotation | None:
    """How the queries and keys of a full-attention layer are turned at `positions` (P,), one row each.

    transformers' decoders have one module that makes cosines and sines for all layers, and their files a function that
    applies them: what that function does to the unit vectors tells which dimensions make a pair.

    Returns: None where the model does not keep to that: other position embeddings, or rotary ones of another make.
    """
    module = _embedding(model)
    apply = None if module is None else getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if module is None or apply is None:
        return None
    device, config = input_device(model), decoder_config(model)
    head_dim = heads_of(config, layer_idx).head_dim
    layer_types = getattr(config, "layer_types", None)
    named = "layer_type" in inspect.signature(module.forward).parameters
    options = {"layer_type": layer_types[layer_idx]} if named and layer_types else {}
    positions = positions[None].to(device)
    try:
        cos, sin = (
            table[0].float()
            for table in module(torch.zeros(1, dtype=torch.float32, device=device), positions, **options)
        )
        partner, sign = _pairs(apply, cos.shape[-1], device)
    except (TypeError, ValueError, RuntimeError, IndexError):  # positions in three dimensions, another signature
        return None
    if cos.shape != (positions.shape[1], len(partner)) or len(partner) > head_dim:
        return None
    still = head_dim - len(partner)  # the last dimensions of a head may not turn
    rest = torch.arange(len(partner), head_dim, device=device)
    pad = torch.nn.functional.pad
    return Rotation(
        pad(cos, (0, still), value=1.0), pad(sin, (0, still)), torch.cat([partner, rest]), pad(sign, (0, still))
    )


def _embedding(model: PreTrainedModel) -> nn.Module | None:
    """The decoder's module that makes cosines and sines; None where there is none, or several."""
    config = decoder_config(model)
    owners = [one for one in model.modules() if getattr(one, "config", None) is config and hasattr(one, "layers")]
    candidates = [getattr(one, "rotary_emb", None) for one in owners]
    found = [one for one in candidates if isinstance(one, nn.Module)]
    return found[0] if len(found) == 1 else None


def _pairs(apply: Any, num_dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each dimension, the other one of its pair, and the sign it comes with: by a quarter turn of unit vectors."""
    unit = torch.eye(num_dims, dtype=torch.float32, device=device)[None, None]
    cos, sin = (unit.new_full((1, num_dims, num_dims), value) for value in (0.0, 1.0))
    turned: Tensor = apply(unit, unit, cos, sin)[0][0, 0]  # (from, to)
    partner = turned.abs().argmax(dim=0)
    sign = turned.gather(0, partner[None])[0]
    if not torch.equal(turned.abs().sum(dim=0), unit.new_ones(num_dims)):
        raise ValueError("no pairs")
    return partner, sign
