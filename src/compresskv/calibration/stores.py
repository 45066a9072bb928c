"""What a model loses when its cache is held in fewer bits: some models' keys bear that, others' do not."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from compresskv.cache.cache import CompressedCache
from compresskv.cache.full import FullCache
from compresskv.methods.full import Full
from compresskv.models.arguments import cache_argument
from compresskv.models.place import input_device
from compresskv.selection.precision import PRECISIONS


@torch.no_grad()
def store_losses(model: PreTrainedModel, read: FullCache, suffix: list[int], answer: list[int]) -> dict[str, float]:
    """The KL divergence of answers from a packed cache, all of whose tokens are kept, in nats per token; in `routing`.

    Args:
        read: of what was read before the suffix; stays as it is.
        suffix: the question's tokens.
        answer: what the full cache answered.
    Returns: by the name of each packed store.
    """
    later, count = [*suffix, *answer[:-1]], len(answer)
    expected, losses = _log_probs(model, read.branch(), later, count), {}
    for name, precision in PRECISIONS.items():
        if precision.is_packed:
            packed = CompressedCache(model, Full(), 1.0, store=name)
            packed.adopt(read)
            found = _log_probs(model, packed, later, count)
            loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / count
            losses[name] = round(float(loss.clamp(min=0)), 6)  # NaN stays, and is refused
    return losses


def _log_probs(model: PreTrainedModel, cache: Cache, token_ids: Sequence[int], count: int) -> Tensor:
    """(count, vocab) float32: after each of the last `count` tokens."""
    inputs = torch.tensor([list(token_ids)], device=input_device(model))
    logits: Tensor = model(input_ids=inputs, use_cache=True, **{cache_argument(model): cache}).logits
    return logits[0, -count:].float().log_softmax(dim=-1)
