"""Attention implementations beside sdpa and eager: flash_attention_2, flex_attention, kernels of the hub, one's own.

A prompt is read by them where nothing of it is padded and they can tell what each token may see. All else, such as
tokens that are decoded from what was kept, goes through sdpa, or eager where heads have sinks or logits a cap.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compresskv.attention.prefill import causal_mask
from compresskv.errors import first_line

_told: set[tuple[str, str]] = set()
"""Of which implementations was said what they do not read."""
_failed: set[tuple[object, ...]] = set()
"""Those that raised, for a kind of module, shape and dtype: PyTorch cannot compile flex_attention for some shapes,
others want half precision."""


@dataclass(frozen=True)
class KernelMask:
    """What an implementation's own mask function made, of a kind of its own, where nothing but the future is masked."""

    mask: Any


@dataclass(frozen=True)
class Kernel:
    """A model's own attention implementation, for one call."""

    base: str
    mask: Any
    """Its own for this forward pass; None where it needs none."""

    def read(
        self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None] | None:
        """Attention over a prompt, as of every attention function; None where it cannot, which is said once.

        Kernels of the flash family align what a token may see to the end of what is stored, so they can read later
        pieces of a prompt, too.

        Args:
            mask: over tokens; None where nothing is masked but the future.
        """
        num_new, num_seen = query.shape[2], keys.shape[2]
        use = (self.base, type(module), query.dtype, query.shape[1], *keys.shape[1::2])
        if num_new == 1 or use in _failed:
            return None
        if mask is not None:
            self._tell("is not used where tokens are hidden (padding, or what was evicted)")
            return None
        lengths = getattr(self.mask, "seq_lengths", None)  # of a BlockMask, which cannot be cut
        is_cut = lengths is not None and tuple(lengths) != (num_new, num_seen)
        if is_cut or (num_new < num_seen and (self.mask is not None or "flash" not in self.base)):
            self._tell("is not used for pieces of a prompt")
            return None
        try:
            output: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[self.base](
                module, query, keys, values, self.mask, **kwargs
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a kernel, or what compiles it, raises
            _failed.add(use)
            self._tell(f"failed here ({type(error).__name__}: {first_line(error)})")
            return None
        return output

    def _tell(self, what: str) -> None:
        if (self.base, what) not in _told:
            _told.add((self.base, what))
            warnings.warn(f"attn_implementation={self.base!r} {what}: sdpa reads that instead", stacklevel=2)


def transformers_mask(base: str, *args: Any, **kwargs: Any) -> Any:
    """What transformers makes for `base`; None where nothing is registered under that name."""
    known = base in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs) if known else None


def kernel_mask(base: str, *args: Any, **kwargs: Any) -> Tensor | KernelMask | None:
    """A mask over tokens, as sdpa's, which shows what is padding; or, where nothing is, what `base` needs itself."""
    mask: Tensor | None = transformers_mask("sdpa", *args, **kwargs)
    if mask is not None:
        return mask
    own = transformers_mask(base, *args, **kwargs)
    return None if own is None else KernelMask(own)


def additive_mask(mask: Tensor | None, query: Tensor, keys: Tensor) -> Tensor | None:
    """The mask as 'eager' functions need it: added to logits, and there wherever several tokens are new."""
    num_new, num_seen = query.shape[2], keys.shape[2]
    if mask is None and num_new > 1:
        mask = causal_mask(num_new, num_seen, query.device)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(query.dtype).min
    )
