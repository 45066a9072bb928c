"""What the machine allows: measured bandwidth and matrix rate, and the least times that follow from them."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from compresskv.models.shape import decoder_config, heads_of
from compresskv.system import memory
from compresskv.system.clock import now

_READ_NBYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
_SMALL_MATRIX = 256
_LONG_S = 0.5
_LEAST_S = 0.1  # that long, or three times, each is repeated; the best counts
_LEAST_REPEATS = 3


@dataclass(frozen=True)
class Limits:
    """The best that was seen of a device."""

    read_bytes_per_s: float
    """Reading a tensor far larger than the caches."""
    matmul_flop_per_s: float
    """Products of two large square matrices in the model's dtype; a multiplication and an addition are two."""

    def best(self, other: "Limits") -> "Limits":
        """The higher of each: what slows a machine now and then does not move its limit."""
        return Limits(
            max(self.read_bytes_per_s, other.read_bytes_per_s), max(self.matmul_flop_per_s, other.matmul_flop_per_s)
        )


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure both, in about a second."""
    return Limits(_read_rate(device), _matmul_rate(device, dtype))


def _read_rate(device: torch.device) -> float:
    """Bytes per second. As float32: how fast bytes come does not depend on what they mean."""
    wanted, available = _READ_NBYTES[_kind(device)], memory.available_nbytes(device)
    nbytes = wanted if available is None else max(1 << 20, min(wanted, available // 8))
    numbers = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    return nbytes / _least_seconds(numbers.sum, device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Of the largest matrices whose product does not take long: some processors lack instructions for some dtypes."""
    largest = _MATRIX_SIZE[_kind(device)]
    size, rate = min(_SMALL_MATRIX, largest), 0.0
    while size <= largest:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _least_seconds(functools.partial(torch.matmul, left, right), device)
        rate = max(rate, 2 * size**3 / seconds)
        if 8 * seconds > _LONG_S:
            break
        size *= 2
    return rate


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def _least_seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    call()
    begin, seconds = now(), list[float]()
    while len(seconds) < _LEAST_REPEATS or now() - begin < _LEAST_S:
        start = now(device)
        call()
        seconds.append(now(device) - start)
    return min(seconds)


def decode_nbytes(model: PreTrainedModel, kv_nbytes: int) -> int:
    """Bytes that a decode step must read: all weights (all experts, too) but an input embedding of its own, and KV."""
    read = {id(weight): weight for weight in model.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is not None and (head is None or embedding.weight is not head.weight):
        read.pop(id(embedding.weight), None)
    return sum(weight.numel() * weight.element_size() for weight in read.values()) + kv_nbytes


def prefill_flop(model: PreTrainedModel, num_tokens: int) -> int:
    """Multiplications and additions of matrix products in reading T tokens, with logits for the last one alone.

    Attention counts the pairs of query and key that a causal mask, or a layer's sliding window, lets through.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    outer = {id(module.weight): module.weight for module in (embedding, head) if module is not None}
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim >= 2 and id(weight) not in outer)
    logits = 0 if head is None else head.weight.numel()
    config, attention = decoder_config(model), 0
    for layer_idx, window in _windows(model).items():
        heads = heads_of(config, layer_idx)
        attention += 4 * heads.num_query_heads * heads.head_dim * _pairs(num_tokens, window)
    return int(2 * num_tokens * matrices + 2 * logits + attention)


def _pairs(num_tokens: int, window: float) -> int:
    inner = int(min(num_tokens, window))
    return inner * (inner + 1) // 2 + (num_tokens - inner) * inner


def _windows(model: PreTrainedModel) -> dict[int, float]:
    """For each attention layer, how many tokens back a query sees."""
    layers = DynamicCache(config=decoder_config(model)).layers
    return {
        layer_idx: float(getattr(layer, "sliding_window", None) or math.inf)
        for layer_idx, layer in enumerate(layers)
        if isinstance(layer, DynamicLayer)
    }
