"""kvpress's presses as contenders. They run in the environment that `scripts/peers` makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.bench.contender import EAGER
from compresskv.bench.session import Prefill, Session
from compresskv.peers.press_cache import masked_modules
from compresskv.peers.press_names import method_name
from compresskv.peers.presses import peer
from compresskv.selection.budgets import resolve
from compresskv.system.clock import now

PRESSES = ("SnapKVPress", "AdaKVPress(SnapKVPress)")
"""One that frees what it evicts, and one that masks it and holds all."""


@dataclass(frozen=True)
class Press:
    """A press with its own defaults, at a budget."""

    name: str
    budget: int | float
    max_prompt: None = None
    decode: str = EAGER
    model: None = None

    @property
    def method(self) -> str:
        """As in records of evaluations."""
        return method_name(self.name)

    def start(self, model: PreTrainedModel, input_ids: Tensor) -> Session:
        """Read the tokens (1, T)."""
        num_tokens, start = input_ids.shape[1], now(model.device)
        tokenizer: Any = None  # of these presses, none needs it
        cache = peer(self.name).compress(model, tokenizer, input_ids, resolve(self.budget, num_tokens))
        first = int(cache.logits.argmax())
        figures = Prefill(
            prompt_tokens=num_tokens,
            held_tokens=cache.held_tokens,
            prefill_s=cache.prefill_s + cache.select_s,
            scoring_s=None,
            eviction_s=cache.select_s,
            num_scorings=None,
            first_token_s=now(model.device) - start,
            kv_nbytes=cache.nbytes,
        )
        masks = _take_masks(model)

        def advance(token: int) -> int:
            step = torch.tensor([[token]], device=model.device)
            return int(cache.read(step, last_only=True).argmax())

        return Session(figures, first, advance, lambda: _masked(masks))


@contextmanager
def _masked(masks: list[tuple[Any, Any]]) -> Iterator[None]:
    """kvpress keeps the masks of a cache on the model's modules, where other caches would meet them: only inside."""
    for module, indices in masks:
        module.masked_key_indices = indices
    try:
        yield
    finally:
        for module, _ in masks:
            module.masked_key_indices = None


def _take_masks(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """The modules with the masks that the last press left on them, which are taken off."""
    masks = [(module, module.masked_key_indices) for module in masked_modules(model)]
    for module, _ in masks:
        module.masked_key_indices = None
    return masks
