"""float32 weights whose numbers fit into 16 bits: a compiled step reads copies of half the size, and widens them.

A checkpoint in bfloat16 or float16 that was turned into float32, because the processor has no instructions for its own
dtype, has such weights. Nothing is lost: widening gives every number back.
"""

import threading
import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskv.system import memory

_CHUNK = 1 << 16
"""Numbers that are looked at together, within the processor's caches."""
_LOW_BITS = (1 << 16) - 1
"""Of a float32 that is also a bfloat16, these are 0."""


class NarrowWeights:
    """Which of a model's linear weights fit into 16 bits, and copies of those."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look at the weights; none is said to fit where memory does not hold the copies. Nothing is copied yet."""
        weights = _linear_weights(model)
        dtypes = {name: dtype for name, weight in weights.items() if (dtype := narrow_dtype(weight)) is not None}
        needed = sum(dtype.itemsize * weights[name].numel() for name, dtype in dtypes.items())
        available = memory.available_nbytes(torch.device("cpu")) if needed else None
        self.dtypes = dtypes if available is None or needed < available else {}
        """Of each weight that fits, by its name in the model."""
        self._state = self._state_of(weights)
        self._copies: dict[str, Tensor] | None = None

    def copies(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The weights in 16 bits, by their names in the model; made at the first call."""
        if self._copies is None:
            weights = _linear_weights(model)
            self._copies = {name: weights[name].to(dtype) for name, dtype in self.dtypes.items()}
        return self._copies

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the weights that fit are still the model's, and hold the same numbers.

        They may have been written to, as adapters are merged, in ways of which PyTorch keeps no count. So their bits
        are added up again, which takes as long as reading the weights once, about a token's time.
        """
        return not self.dtypes or self._state_of(_linear_weights(model)) == self._state

    def _state_of(self, weights: dict[str, Tensor]) -> list[object]:
        """Where each lies, and the sum of its bits modulo 2 ** 32, which every change of one number changes."""
        own = {name: weights[name] for name in self.dtypes if name in weights}
        return [
            (name, weight.data_ptr(), weight.shape, int(weight.view(torch.int32).sum(dtype=torch.int32)))
            for name, weight in own.items()
        ]


_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[PreTrainedModel, NarrowWeights] = weakref.WeakKeyDictionary()


def narrow_weights(model: PreTrainedModel) -> NarrowWeights:
    """A model's, which all its compiled steps share; made anew where its weights have changed."""
    with _lock:
        found = _known.get(model)
        if found is None or not found.dtypes or not found.fits(model):
            found = _known[model] = NarrowWeights(model)
        return found


def narrow_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype of 16 bits that holds each of a float32 tensor's numbers exactly; None: there is none."""
    if not any(bool((chunk & _LOW_BITS).count_nonzero()) for chunk in weight.view(torch.int32).view(-1).split(_CHUNK)):
        return torch.bfloat16
    if all(torch.equal(chunk.half().float(), chunk) for chunk in weight.view(-1).split(_CHUNK)):
        return torch.float16
    return None


def _linear_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The float32 weights of the linear layers, each tensor under one name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and weight.dtype == torch.float32 and weight.is_contiguous():
            found.setdefault(id(weight), (f"{name}.weight", weight.detach()))
    return dict(found.values())
