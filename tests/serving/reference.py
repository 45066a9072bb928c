"""Independent references: plain transformers with a mask, and our own engine."""

import functools
from collections.abc import Sequence

import torch
from engine import SHIPS_LOG
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import compresskv
from compresskv.models.decoding import prefill

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@functools.cache
def loaded() -> Loaded:
    """The embedded model in float32."""
    return compresskv.load(dtype="float32", device="cpu")


@functools.cache
def ships_log() -> list[int]:
    """A text of some 5,000 tokens."""
    ids: list[int] = loaded()[1](SHIPS_LOG.read_text(encoding="utf-8"))["input_ids"]
    return ids


def masked_logprobs(prompt: Sequence[int], answer: Sequence[int], kept: Sequence[int] | None) -> Tensor:
    """(answer, vocabulary): what plain transformers says at each token of the answer, fed with the answer.

    Args:
        kept: tokens of the prompt that queries behind it see; None: all. No cache is used.
    """
    model, _ = loaded()
    num_prompt, num_all = len(prompt), len(prompt) + len(answer) - 1
    mask = torch.ones(num_all, num_all, dtype=torch.bool).tril()
    if kept is not None:
        gone = torch.ones(num_prompt, dtype=torch.bool)
        gone[list(kept)] = False
        mask[num_prompt:, :num_prompt] &= ~gone
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.no_grad():
        output = model(ids, attention_mask=mask[None, None], use_cache=False, logits_to_keep=len(answer))
    return output.logits[0].float().log_softmax(dim=-1)


def own_positions(
    prompt: Sequence[int], method: str, budget: int | float, model: PreTrainedModel | None = None, **options: object
) -> list[int]:
    """What `compressing` keeps of the prompt in its first layer; all layers must agree."""
    model = model or loaded()[0]
    with compresskv.compressing(model, method, budget, candidates=None, **options) as cache:
        prefill(model, torch.tensor([list(prompt)]), cache)
        kept = {tuple(layer.positions[0, 0].tolist()) for layer in cache.compressed_layers}
    assert len(kept) == 1
    return list(kept.pop())
