"""What a model loses when its cache is held in fewer bits, or when tokens go before a question is known: models differ
in both.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from compresskv.cache.cache import CompressedCache
from compresskv.cache.full import FullCache
from compresskv.methods.base import Method
from compresskv.methods.full import Full
from compresskv.models.arguments import cache_argument
from compresskv.models.place import input_device
from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.selection.precision import PRECISIONS

SHARES = (0.0625, 0.125, 0.25, 0.5)
"""Of a document's tokens, which are kept."""


def store_losses(model: PreTrainedModel, read: FullCache, suffix: list[int], answer: list[int]) -> dict[str, float]:
    """The KL divergence of answers from a packed cache, all of whose tokens are kept, in nats per token; in `routing`.

    Args:
        read: of what was read before the suffix; stays as it is.
        suffix: the question's tokens.
        answer: what the full cache answered.
    Returns: by the name of each packed store that can hold the model's heads.
    """
    dims = {heads_of(decoder_config(model), layer_idx).head_dim for layer_idx in compressible_layers(model)}
    packed = [name for name, one in PRECISIONS.items() if one.is_packed and all(map(one.fits, dims))]
    caches = {name: CompressedCache(model, Full(), 1.0, store=name) for name in packed}
    return _losses(model, read, suffix, answer, caches)


def document_losses(
    model: PreTrainedModel, read: FullCache, suffix: list[int], answer: list[int], method: Method
) -> dict[str, float]:
    """The same of a cache that `method`, which needs no queries, has cut to each of `SHARES`, and nothing is packed.

    Returns: by the share, as text.
    """
    return _losses(
        model, read, suffix, answer, {f"{share:g}": CompressedCache(model, method, share) for share in SHARES}
    )


@torch.no_grad()
def _losses(
    model: PreTrainedModel,
    read: FullCache,
    suffix: list[int],
    answer: list[int],
    caches: Mapping[str, CompressedCache],
) -> dict[str, float]:
    """Of each cache, once it has taken over what was read."""
    later, count = [*suffix, *answer[:-1]], len(answer)
    expected, losses = _log_probs(model, read.branch(), later, count), {}
    for name, cache in caches.items():
        cache.adopt(read)
        found = _log_probs(model, cache, later, count)
        cache.reset()
        loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / count
        losses[name] = round(float(loss.clamp(min=0)), 6)  # NaN stays, and is refused
    return losses


def _log_probs(model: PreTrainedModel, cache: Cache, token_ids: Sequence[int], count: int) -> Tensor:
    """(count, vocab) float32: after each of the last `count` tokens."""
    inputs = torch.tensor([list(token_ids)], device=input_device(model))
    logits: Tensor = model(input_ids=inputs, use_cache=True, **{cache_argument(model): cache}).logits
    return logits[0, -count:].float().log_softmax(dim=-1)
