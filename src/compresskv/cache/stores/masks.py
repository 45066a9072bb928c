"""Attention masks: transformers counts columns by tokens seen, a compressed layer stores fewer."""

import torch
from torch import Tensor

from compresskv.selection.select import EMPTY_SLOT


def retained_mask(mask: Tensor, positions: Tensor, num_prompt: int, num_query_heads: int) -> Tensor:
    """Cut a mask over all tokens seen to what is stored: the named prompt tokens, and all that came later.

    Args:
        mask: (B or 1, 1, T_new, seen), bool or additive.
        positions: (B, 1 or H_kv, R), prompt tokens, or `EMPTY_SLOT`.
    Returns: (B, 1 or H_q, T_new, stored).
    """
    num_heads, num_new = positions.shape[1], mask.shape[2]
    index = positions.clamp(min=0)[:, :, None].expand(-1, -1, num_new, -1)
    old = mask[..., :num_prompt].expand(len(positions), num_heads, -1, -1).gather(-1, index)
    blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    old = old.masked_fill((positions == EMPTY_SLOT)[:, :, None], blocked)
    new = mask[..., num_prompt:].expand(*old.shape[:3], -1)
    cut = torch.cat([old, new], dim=-1)
    return cut if num_heads == 1 else cut.repeat_interleave(num_query_heads // num_heads, dim=1)


def valid_keys(mask: Tensor | None) -> Tensor | None:
    """(B, T) bool: the keys that the last query may attend to. It is the prompt's end, so all but padding."""
    if mask is None:
        return None
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
