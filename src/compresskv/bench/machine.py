"""What a result names beside its figures: the model, and the machine they were measured on."""

import os
import platform
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from compresskv.models.quantize import weights_dtype
from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.system import memory
from compresskv.system.processor import processor_name


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and memory; nothing that tells whose machine it is."""
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "available_nbytes": memory.available_nbytes(device),
        "system": platform.system(),
    }


def describe(model: PreTrainedModel, name: str, *, random: bool) -> dict[str, Any]:
    """The model's name, dtype and geometry."""
    config = decoder_config(model)
    heads = heads_of(config, compressible_layers(model)[0])
    return {
        "name": name,
        "random_weights": random,
        "dtype": weights_dtype(model),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "weights_nbytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        "num_layers": config.num_hidden_layers,
        "num_query_heads": heads.num_query_heads,
        "num_kv_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
    }
