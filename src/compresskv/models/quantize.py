"""8-bit weights, by torchao: a model takes half of the memory, and a compiled step reads half as much."""

from typing import Any

import torch
from transformers import PreTrainedModel

from compresskv.errors import ConfigError
from compresskv.models.fingerprint import fingerprint, remember

INT8 = "int8"


def check_int8(option: str = "dtype") -> None:
    """Find out whether weights can be quantised, before a model is loaded.

    Args:
        option: the parameter that asks for it, for the error message.

    Raises:
        ConfigError: torchao is not installed.
    """
    _torchao(option)


def quantize_int8(model: PreTrainedModel) -> None:
    """Store the weights of all linear layers as int8, with one scale for each output (symmetric, by the largest).

    Activations stay as they are. The model keeps the profile of its unquantised weights.

    Raises:
        ConfigError: torchao is not installed.
    """
    quantize, config, unwrap = _torchao("dtype")
    own = fingerprint(model)
    quantize(model, config)
    unwrap(model)  # plain tensors, which a compiled step can be given
    model.requires_grad_(False)
    remember(model, own)


def weights_dtype(model: PreTrainedModel) -> str:
    """'float32', 'bfloat16', 'float16', or 'int8' of a model with 8-bit weights."""
    if any(weight.dtype == torch.int8 for weight in model.parameters()):
        return INT8
    return str(model.dtype).removeprefix("torch.")


def _torchao(option: str) -> tuple[Any, Any, Any]:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        from torchao.utils import unwrap_tensor_subclass
    except ImportError:
        raise ConfigError("needs torchao: pip install 'compresskv[int8]'", option=option, value=INT8) from None
    return quantize_, Int8WeightOnlyConfig(set_inductor_config=False), unwrap_tensor_subclass
