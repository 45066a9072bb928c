"""What the processor multiplies: dtypes for which a CPU has instructions, and the quick one where it has none."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from compresskv.system import memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_warned: WeakSet[PreTrainedModel] = WeakSet()
_FEW_WEIGHTS = 10_000_000  # so small a model is quick in any dtype


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of that dtype are multiplied by instructions made for it.

    By what PyTorch's matrix library says of the processor, not by a timing: the same machine always computes in the
    same dtype. Without such instructions, PyTorch takes up to four hundred times as long as in float32.
    """
    if device.type != "cpu" or dtype not in _CHECKS:
        return True
    check = getattr(torch.ops.mkldnn, _CHECKS[dtype], None) if torch.backends.mkldnn.is_available() else None
    return check is not None and bool(check())


def use_quick_dtype(model: PreTrainedModel) -> None:
    """Turn a model into float32, which loses nothing, where its own dtype is slow here and memory holds it.

    A quantised model stays as it is.
    """
    if multiplies(model.dtype, model.device) or getattr(model, "is_quantized", False):
        return
    needed = sum(weight.numel() * torch.float32.itemsize for weight in model.parameters())
    available = memory.available_nbytes(model.device)
    if available is None or needed < available:
        model.float()
        model.config.dtype = torch.float32


def warn_of_slow_dtype(model: PreTrainedModel) -> None:
    """Say once of a model that its dtype is slow here, and what helps."""
    if model in _warned or multiplies(model.dtype, model.device) or model.num_parameters() < _FEW_WEIGHTS:
        return
    _warned.add(model)
    name = str(model.dtype).removeprefix("torch.")
    warnings.warn(
        f"this processor has no instructions for {name}, in which the model's weights are: float32 is faster",
        category=UserWarning,
        stacklevel=3,
    )
