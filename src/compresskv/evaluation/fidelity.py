"""How near a compressed cache stays to the full one, without decoding: evidence recall and teacher-forced fidelity."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from compresskv.cache.cache import CompressedCache
from compresskv.cache.full import branch
from compresskv.models.arguments import cache_argument
from compresskv.models.decoding import decode
from compresskv.models.place import devices_of, input_device
from compresskv.system.clock import now


@dataclass(frozen=True)
class Reference:
    """The full cache's own greedy answer, and what it thought at each step."""

    token_ids: list[int]
    log_probs: Tensor
    """(n - 1, vocab) float32: log-probabilities of the tokens after the first; the first comes before any eviction."""
    decode_s: float = 0.0
    """What decoding the answer took."""


@dataclass(frozen=True)
class Fidelity:
    """Means over the tokens of the full cache's answer, the first one left out."""

    kl_divergence: float
    """Nats per token, of the full cache's distribution from the compressed one's."""
    top1_agreement: float
    """Share of tokens at which both would choose the same."""


def reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, first: int, max_new_tokens: int
) -> Reference:
    """Decode greedily from the full cache (which stays as it is), then read the answer again in one pass.

    The second reading is what every compressed cache is compared with: both are multi-token passes, so that rounding
    that differs between one-token and multi-token steps does not count as a loss.
    """
    devices = devices_of(model)
    start = now(*devices)
    token_ids = decode(model, tokenizer, first, branch(cache), max_new_tokens)
    decode_s = now(*devices) - start
    return Reference(token_ids, teacher_forced(model, cache, token_ids), decode_s)


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, cache: Cache, token_ids: Sequence[int]) -> Tensor:
    """(n - 1, vocab) log-probabilities after each token but the last. `cache` stays as it is."""
    if len(token_ids) < 2:
        return torch.empty(0, 0)
    return _read_again(model, cache, token_ids, 1)[0]


def _read_again(model: PreTrainedModel, cache: Cache, token_ids: Sequence[int], num_rows: int) -> Tensor:
    """(B, n - 1, vocab): every row of the cache reads the same tokens."""
    inputs = torch.tensor([list(token_ids[:-1])] * num_rows, device=input_device(model))
    logits: Tensor = model(input_ids=inputs, use_cache=True, **{cache_argument(model): branch(cache)}).logits
    return logits.float().log_softmax(dim=-1)


def fidelity(model: PreTrainedModel, cache: Cache, full: Reference, num_ahead: int = 0) -> Fidelity | None:
    """Feed the full cache's answer through a compressed cache, in one multi-token pass. `cache` stays as it is.

    Args:
        num_ahead: how many tokens of the answer `cache` holds already, read before anything was evicted. They count
            in the means, as equal to the full cache's.
    Returns: None where the answer has one token only: it was chosen before eviction.
    """
    if len(full.token_ids) < 2:
        return None
    if len(full.token_ids) < num_ahead + 2:
        return Fidelity(0.0, 1.0)
    return nearness(teacher_forced(model, cache, full.token_ids[num_ahead:]), full.log_probs, num_ahead)


@torch.no_grad()
def fidelities(model: PreTrainedModel, cache: CompressedCache, full: Reference, num_rows: int) -> list[Fidelity | None]:
    """`fidelity` of each of the cache's rows, in one pass: they share the weights. `cache` stays as it is."""
    if len(full.token_ids) < 2:
        return [None] * num_rows
    return [nearness(row, full.log_probs) for row in _read_again(model, cache, full.token_ids, num_rows)]


def nearness(log_probs: Tensor, full: Tensor, num_ahead: int = 0) -> Fidelity:
    """Compare log-probabilities (n - num_ahead, vocab) with the full cache's (n, vocab), its first steps left out.

    Args:
        num_ahead: as for `fidelity`.
    """
    expected = full[num_ahead:]
    kl = torch.nn.functional.kl_div(log_probs, expected, reduction="none", log_target=True).sum()
    num_same = num_ahead + int((log_probs.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
    return Fidelity(float(kl.clamp(min=0)) / len(full), num_same / len(full))


def evidence_recall(cache: CompressedCache, evidence: Sequence[slice]) -> float | None:
    """Share of the evidence tokens retained, mean over layers and KV heads. Batches of one prompt.

    None where no evidence is known, or none of it is left in the prompt.
    """
    tokens = sorted({token for span in evidence for token in range(span.start, span.stop)})
    if not tokens:
        return None
    shares = []
    for layer in cache.compressed_layers:
        if layer.positions is None:
            shares.append(1.0)
        else:
            wanted = torch.tensor(tokens, device=layer.positions.device)
            kept = (layer.positions[0, :, :, None] == wanted).any(dim=1)  # (H, evidence tokens)
            shares.append(float(kept.float().mean()))
    return sum(shares) / len(shares)
