"""What the elements of a layer's cache are: numbers as the model computes with them, or fp8 times a scale."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresskv.errors import ServingError

FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""By vLLM's names for them, what the bytes mean that it keeps."""
UNQUANTISED = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Numbers:
    """How a backend puts numbers into a layer's cache, and what they are when it reads them."""

    fp8: torch.dtype | None
    """None: they are kept as they are."""
    dtype: torch.dtype
    """In which they come, and are computed with."""
    key_scale: float = 1.0
    """Keys are kept divided by this."""
    value_scale: float = 1.0

    @classmethod
    def of(cls, layer: Any) -> "Numbers":
        """Those of vLLM's Attention, with its cache.

        Raises:
            ServingError: it is quantised in a way that is not known here.
        """
        name = layer.kv_cache_dtype
        if name in UNQUANTISED:
            return cls(None, layer.kv_cache.dtype)
        if name not in FP8 or layer.kv_cache.element_size() != 1:
            raise ServingError(f"compresskv inside vLLM: a KV cache of {name} ({layer.kv_cache.dtype}) is not known")
        return cls(FP8[name], layer.dtype, float(layer._k_scale_float), float(layer._v_scale_float))

    @property
    def base(self) -> int:
        """How many whole numbers from 0 on are kept exactly, in bfloat16 or in the smaller of the fp8 formats."""
        return 256 if self.fp8 is None else 8

    def to_write(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that are found again by `written`.

        Args:
            digits: (2, ...), whole numbers below `base`.
        """
        if self.fp8 is None:
            return digits[0].to(self.dtype), digits[1].to(self.dtype)
        # vLLM's CPU build cuts digits off instead of rounding: what scales make a little too small must not fall
        above = digits.double() + 0.1
        return (above[0] * self.key_scale).to(self.dtype), (above[1] * self.value_scale).to(self.dtype)

    def written(self, elements: Tensor) -> Tensor:
        """The digits that a backend made these elements of, int64."""
        return (elements if self.fp8 is None else elements.view(self.fp8).float().round()).long()

    def keys(self, elements: Tensor) -> Tensor:
        """The keys that these elements are to attention."""
        if self.fp8 is None:
            return elements
        keys = elements.view(self.fp8).to(self.dtype)
        return keys if self.key_scale == 1 else keys.mul_(self.key_scale)
