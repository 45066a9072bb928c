"""How much a token's key says that others say as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskv.system.later import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

_ROWS_NBYTES = 16 << 20
"""About what the similarities take that are computed at once."""


@no_grad
def redundancy(keys: Tensor, threshold: float, valid: Tensor | None = None) -> Tensor:
    """The softmax over tokens of the mean cosine similarity between a token's key and all others'.

    Each token forgives one of those whose keys are like its own, by more than `threshold`: the latest. So of a run of
    tokens that say the same the last ones count as less redundant.

    Args:
        keys: (B, H_kv, T, D), post-RoPE.
        valid: (B, T) bool, False at padding; None where nothing is padded.
    Returns: (B, H_kv, T) float32; 0 at padding.
    Source: R-KV (arXiv 2505.24133), section 3.2, and its published code.
    """
    num_tokens = keys.shape[2]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    if valid is not None:
        unit = unit * valid[:, None, :, None]
    places = torch.arange(num_tokens, device=keys.device)
    sums = unit.new_zeros(unit.shape[:3])
    step = max(1, _ROWS_NBYTES // (4 * keys.shape[0] * keys.shape[1] * num_tokens))
    for start in range(0, num_tokens, step):
        rows = places[start : start + step]
        similar = unit[:, :, start : start + step] @ unit.transpose(2, 3)
        similar[..., torch.arange(len(rows), device=keys.device), rows] = 0
        latest = torch.where(similar > threshold, places, -1).amax(dim=-1, keepdim=True)
        kept = similar.gather(-1, latest.clamp(min=0))
        similar.scatter_(-1, latest.clamp(min=0), torch.where(latest < 0, kept, 0.0))
        sums += similar.sum(dim=2)
    counts = num_tokens if valid is None else valid.sum(dim=-1)[:, None, None]
    means = sums / counts
    if valid is not None:
        means = means.masked_fill(~valid[:, None], -torch.inf)
    return means.softmax(dim=-1)
