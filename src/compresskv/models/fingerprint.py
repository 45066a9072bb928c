"""Which model a profile belongs to: architecture, shape, and a hash over sampled weights."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from compresskv.errors import ModelError
from compresskv.models.place import weight_of
from compresskv.models.shape import decoder_config, full_attention_layers, heads_of
from compresskv.system.later import no_grad, torch
from compresskv.system.precise import precisely

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_NUM_TENSORS = 8
_NUM_VALUES = 64
_SMALLEST = 2.0**-10


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of a model's weights. `weights` is None where only the shape is known (imported profiles)."""

    architecture: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    weights: str | None = None

    def __str__(self) -> str:
        shape = f"{self.num_layers}x{self.num_query_heads}x{self.num_kv_heads}x{self.head_dim}x{self.vocab_size}"
        return f"{self.architecture}-{shape}-{self.weights or 'any'}"

    def matches(self, other: Fingerprint) -> bool:
        """Equal; an unknown `weights` on either side is not held against the other."""
        if self.weights is None or other.weights is None:
            return replace(self, weights=None) == replace(other, weights=None)
        return self == other


_REMEMBERED = "_compresskv_fingerprint"


def remember(model: PreTrainedModel, own: Fingerprint) -> None:
    """Let `fingerprint` say this of a model from now on, whose weights it can no longer read."""
    setattr(model, _REMEMBERED, own)  # on the model itself, so that copies of it know it, too


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """Identify a loaded model.

    The hash takes 64 values of 8 weight matrices, as bfloat16 and with tiny values as 0, so that a checkpoint loaded in
    float32 or bfloat16 is the same model. A float32 checkpoint that was cut to float16, or a quantised one, is not.

    Raises:
        ModelError: a sampled weight is NaN or infinite, or its data is not loaded.
    """
    remembered: Fingerprint | None = getattr(model, _REMEMBERED, None)
    if remembered is not None:
        return remembered
    packed = _packed_weights(model)
    shapes = {name: tuple(weight.shape) for name, weight in (*model.named_parameters(), *packed.items())}
    read = functools.partial(weight_of, model)
    digest = weights_digest(shapes, lambda name: packed[name] if name in packed else read(name))
    return of_shape(decoder_config(model), digest)


def _packed_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights that others have quantised and keep as buffers of integers, as GPTQ and AWQ are read."""
    if getattr(model.config, "quantization_config", None) is None:
        return {}
    kept = ((name, buffer) for name, buffer in model.named_buffers() if buffer.ndim >= 2)
    return {name: buffer for name, buffer in kept if not (buffer.is_floating_point() or buffer.dtype == torch.bool)}


def of_shape(config: PretrainedConfig, weights: str | None) -> Fingerprint:
    """The fingerprint of a decoder with this config, and with `weights` as their digest.

    Where layers differ in their heads, it names those of the first full-attention layer: it is these that are scored.
    """
    heads = heads_of(config, next(iter(full_attention_layers(config)), 0))
    return Fingerprint(
        architecture=config.model_type,
        num_layers=config.num_hidden_layers,
        num_query_heads=heads.num_query_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        vocab_size=config.vocab_size,
        weights=weights,
    )


@no_grad
def weights_digest(shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> str:
    """16 hex digits that stand for a model's weights.

    Args:
        shapes: of every parameter by name, tied ones once.
        read: gives the parameter of a name; called for the few that are sampled.
    Raises:
        ModelError: as for `fingerprint`.
    """
    matrices = sorted(name for name, shape in shapes.items() if len(shape) >= 2)
    num_sampled = min(_NUM_TENSORS, len(matrices))
    names = [matrices[i * len(matrices) // num_sampled] for i in range(num_sampled)]
    digest = hashlib.sha256()
    for name, values in zip(names, _on_cpu([_sample(read(name)) for name in names]), strict=True):
        if not torch.isfinite(values).all():
            raise ModelError(f"weight {name} holds NaN or infinity: the checkpoint is damaged")
        digest.update(str(tuple(shapes[name])).encode())
        kept = torch.where(values.abs() < _SMALLEST, 0.0, values)
        digest.update(kept.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(weight: Tensor) -> Tensor:
    """Some of its values. They are rounded before tiny ones are dropped: loading in bfloat16 rounds first, too."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(weight):  # quantised: its parts lie in tensors of its own
        weight = weight.dequantize()
    step = math.ceil(weight.numel() / _NUM_VALUES)
    return weight.detach().reshape(-1)[::step].to(torch.bfloat16)


@precisely
def _on_cpu(samples: list[Tensor]) -> list[Tensor]:
    """The same in the CPU's memory: together, since each transfer waits for the device."""
    if len({sample.device for sample in samples}) != 1:
        return [sample.cpu() for sample in samples]
    return list(torch.cat(samples).cpu().split([len(sample) for sample in samples]))
