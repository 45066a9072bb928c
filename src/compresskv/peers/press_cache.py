"""The cache that a press left behind: what it holds, and how to read on from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compresskv.system.memory import storage_nbytes


@dataclass
class PressCache:
    """A prompt's keys and values after a press has compressed them.

    One at a time for each model: kvpress keeps the masks of its masking presses on the model's modules.
    """

    model: PreTrainedModel
    cache: DynamicCache
    num_tokens: int
    """Tokens that were compressed."""
    next_position: int
    """Of the next token: `num_tokens`, or fewer where the press moved the keys that it kept together."""
    logits: Tensor
    """(vocab,): what the last token that was read predicts."""
    prefill_s: float
    select_s: float
    """Scoring, selecting and gathering; KVzip's passes over the repeated context too."""
    retained_tokens: float = field(init=False)
    """Neither removed nor masked, mean over layers and KV heads."""
    held_tokens: float = field(init=False)
    """Stored, masked ones included, mean over layers."""
    nbytes: int = field(init=False)
    """Of the storages really held."""
    nbytes_full: int = field(init=False)
    """The same for all of `num_tokens`."""

    def __post_init__(self) -> None:
        states = [layer_states for layer in self._layers for layer_states in (layer.keys, layer.values)]
        num_kv_heads = states[0].shape[1]
        num_masked = sum(len(indices[0]) for _, indices in masks(self.model))
        self.held_tokens = sum(self.lengths) / len(self._layers)
        self.retained_tokens = self.held_tokens - num_masked / (len(self._layers) * num_kv_heads)
        self.nbytes = storage_nbytes(states)
        self.nbytes_full = self.num_tokens * sum(tensor[:, :, 0].numel() * tensor.element_size() for tensor in states)

    @property
    def _layers(self) -> list[Any]:
        return list(self.cache.layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens stored in each layer now."""
        return [layer.keys.shape[2] for layer in self._layers]

    @torch.no_grad()
    def read(self, input_ids: Tensor, *, last_only: bool = False) -> Tensor:
        """Read more tokens (1, N), in one pass where that is possible, else one at a time.

        Returns: (N or 1, vocab), what each predicts.
        """
        lengths, position = self.lengths, self.next_position
        # transformers builds one mask for all layers, so layers of unequal length cannot take several tokens at once
        steps = input_ids.split(1, dim=1) if len(set(lengths)) > 1 else (input_ids,)
        try:
            logits = [self._forward(step, last_only) for step in steps]
        except ValueError:  # a masking press found no fake key that all queries of the pass ignore
            if len(steps) == input_ids.shape[1]:
                raise
            self._go_back(lengths, position)
            logits = [self._forward(step, last_only) for step in input_ids.split(1, dim=1)]
        self.logits = logits[-1][-1]
        return self.logits[None] if last_only else torch.cat(logits)

    def _go_back(self, lengths: list[int], position: int) -> None:
        for layer, length in zip(self._layers, lengths, strict=True):
            if removed := layer.keys.shape[2] - length:
                layer.crop(-removed)
        self.next_position = position

    def _forward(self, input_ids: Tensor, last_only: bool) -> Tensor:
        # True positions: the cache is shorter than what it stands for, so transformers' own count would be too low.
        end = self.next_position + input_ids.shape[1]
        positions = torch.arange(self.next_position, end, device=input_ids.device)[None]
        self.next_position = end
        output: Any = self.model(
            input_ids=input_ids,
            past_key_values=self.cache,
            position_ids=positions,
            logits_to_keep=1 if last_only else 0,
        )
        logits: Tensor = output.logits[0]
        return logits

    def decode(self, ends: set[int], max_new_tokens: int) -> list[int]:
        """Continue greedily until a token of `ends` or `max_new_tokens`."""
        token_ids = [int(self.logits.argmax())]
        while token_ids[-1] not in ends and len(token_ids) < max_new_tokens:
            step = torch.tensor([token_ids[-1:]], device=self.model.device)
            token_ids.append(int(self.read(step, last_only=True).argmax()))
        return token_ids

    def teacher_forced(self, token_ids: Sequence[int]) -> Tensor:
        """(n - 1, vocab) logits after each token but the last. The cache stays as it was."""
        lengths, position, last = self.lengths, self.next_position, self.logits
        logits = self.read(torch.tensor([list(token_ids[:-1])], device=self.model.device))
        self._go_back(lengths, position)
        self.logits = last
        return logits


Masks = list[tuple[Any, Any]]
"""Modules, each with the indices of keys that kvpress masks on it."""


def masks(model: PreTrainedModel) -> Masks:
    """What the last press left on a model's modules."""
    found = ((module, getattr(module, "masked_key_indices", None)) for module in model.modules())
    return [(module, indices) for module, indices in found if indices is not None]


def put_masks(found: Masks, *, on: bool) -> None:
    """Put masks on their modules, or take them off."""
    for module, indices in found:
        module.masked_key_indices = indices if on else None
