"""8-bit weights, by torchao: a model takes half of the memory, and a compiled step reads half as much."""

from typing import Any

import torch
from torch import nn
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
        ConfigError: torchao is not installed, or the model is quantised already.
    """
    quantize, config, unwrap = _torchao("dtype")
    if (kind := quantised_by(model)) is not None:
        raise ConfigError(
            f"cannot be made of weights that are quantised already, by {kind}", option="dtype", value=INT8
        )
    own = fingerprint(model)
    quantize(model, config)
    unwrap(model)  # plain tensors, which a compiled step can be given
    model.requires_grad_(False)
    remember(model, own)


def weights_dtype(model: PreTrainedModel) -> str:
    """'float32', 'bfloat16', 'float16', or 'int8' of a model with 8-bit weights; behind it, who else quantised them."""
    is_int8 = any(weight.dtype == torch.int8 for weight in model.parameters())
    dtype = INT8 if is_int8 else str(model.dtype).removeprefix("torch.")
    kind = quantised_by(model)
    return dtype if kind is None else f"{dtype} ({kind})"


def quantised_by(model: PreTrainedModel) -> str | None:
    """Who quantised a model's weights, if not `quantize_int8`.

    The library that a checkpoint's config names, or the class of weights that are no plain tensors.
    """
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method is not None:
        return str(getattr(method, "value", method))
    return next((type(weight).__name__ for weight in model.parameters() if type(weight) is not nn.Parameter), None)


def _torchao(option: str) -> tuple[Any, Any, Any]:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        from torchao.utils import unwrap_tensor_subclass
    except ImportError:
        raise ConfigError("needs torchao: pip install 'compresskv[int8]'", option=option, value=INT8) from None
    return quantize_, Int8WeightOnlyConfig(set_inductor_config=False), unwrap_tensor_subclass
