"""What the queries of a replayed text attend to among the tokens they replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskv.selection.scores import window_products
from compresskv.system.later import no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

_QUERIES_AT_ONCE = 128


@no_grad
def largest_attention(
    queries: Tensor,
    keys: Tensor,
    num_before: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The largest attention that any query gives to each of the first tokens.

    Args:
        queries: (B, H_kv * G, R, D), of the last R tokens of `keys`.
        keys: (B, H_kv, N + R, D).
        num_before: N, the tokens before the queries' own.
        scaling, softcap, sinks: as for `compresskv.selection.scores.window_attention`.
    Returns: (B, H_kv, N) float32, over all queries and the G query heads that read a KV head.
    """
    batch_size, num_kv_heads = keys.shape[:2]
    largest = keys.new_zeros(batch_size, num_kv_heads, num_before, dtype=torch.float32)
    for start in range(0, queries.shape[2], _QUERIES_AT_ONCE):
        some = queries[:, :, start : start + _QUERIES_AT_ONCE]
        num = some.shape[2]
        logits = window_products(some, keys[:, :, : num_before + start + num]).mul_(scaling)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        future = torch.ones(num, num, dtype=torch.bool, device=keys.device).triu_(1)
        logits[..., -num:].masked_fill_(future, -torch.inf)
        total = logits.logsumexp(dim=-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.float()[:, None, None])
        seen = logits[..., :num_before].sub_(total).amax(dim=2)  # (B, H_q, N)
        torch.maximum(largest, seen.exp_().view(batch_size, num_kv_heads, -1, num_before).amax(dim=2), out=largest)
    return largest
