"""Reading a text once more, to see what of its cache the second reading looks at."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.attention.masks import without_masks
from compresskv.attention.routing import base_implementation
from compresskv.cache.full import FullCache
from compresskv.errors import PromptError
from compresskv.models.decoding import prefill
from compresskv.models.place import input_device
from compresskv.models.positions import last_learned
from compresskv.prompts.prompt import context_length

CHUNK_TOKENS = 2048
"""Tokens that are replayed at once."""
LEAD_TOKENS = 8
"""Tokens before each later chunk that say where the replay goes on."""
_LEAST_CHUNK = 64
NUM_SINKS = 4
"""First tokens that every query may attend to, whatever chunk it replays."""


@dataclass(frozen=True)
class Replayed:
    """The piece of the text that is being read again."""

    start: int
    """Its first token."""
    stop: int
    """The token after its last."""


class Replaying(Protocol):
    """A full cache's layer that can note the attention of a replay."""

    replayed: Replayed | None
    """What the next forward pass replays; None: it is no replay."""
    noted: Tensor | None
    """(1, H_kv, T) float32: the largest attention that each token got so far. Written in place, by branches too."""


def replay(
    model: PreTrainedModel,
    cache: FullCache,
    token_ids: Sequence[int],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    on_chunk: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Read the text again in chunks, each after the whole of it, and note what the queries attend to.

    A chunk's queries choose among the chunk's own tokens, the first `NUM_SINKS` and what they replayed before.

    Args:
        cache: holds the text; its full-attention layers are `Replaying`. It stays as it is.
        token_ids: the text's, all of them.
        on_chunk: called with (tokens replayed, tokens).
    Raises:
        PromptError: as `check_room`.
    Returns: for each full-attention layer (1, H_kv, T) float32: the largest attention of all queries and query heads.
    Source: KVzip (arXiv 2505.23416), section 3. Differs: the text alone is repeated, without an instruction to do so,
    so that no tokenizer is needed.
    """
    check_room(model, len(token_ids))
    layers = cache.routed
    for layer in layers:
        keys, _ = layer.stored()
        layer.noted = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    # Without a mask, attention over a prompt's later pieces is faster. A sliding window, and 'eager', need theirs.
    maskless = len(layers) == len(cache.layers) and base_implementation(model) == "sdpa"
    masks = without_masks if maskless else nullcontext
    step = _chunk_tokens(model, len(token_ids), chunk_tokens)
    for start in range(0, len(token_ids), step):
        stop = min(start + step, len(token_ids))
        branch = cache.branch()
        for layer in branch.routed:
            layer.replayed = Replayed(start, stop)
        ids = list(token_ids[max(0, start - LEAD_TOKENS) : stop])
        with masks():
            prefill(model, torch.tensor([ids], device=input_device(model)), branch)
        if on_chunk is not None:
            on_chunk(stop, len(token_ids))
    found: list[Tensor] = [layer.noted for layer in layers]
    for layer in layers:
        layer.noted = None
    return found


def check_room(model: PreTrainedModel, num_tokens: int) -> None:
    """Refuse a text that cannot be replayed behind itself, before it is read.

    Raises:
        PromptError: the model has a table of positions, which would end within a chunk.
    """
    limit = last_learned(model)
    needed = num_tokens + LEAD_TOKENS + min(num_tokens, _LEAST_CHUNK)
    if limit is not None and needed > limit:
        raise PromptError(
            f"reading {num_tokens} tokens a second time, behind themselves, needs {needed} positions, but the model "
            f"has {limit}: shorten the text, or choose a method that reads it once"
        )


def _chunk_tokens(model: PreTrainedModel, num_tokens: int, wanted: int) -> int:
    """As many as fit behind the text into the positions that the model knows, but not next to none."""
    limit = context_length(model)
    room = wanted if limit is None else limit - num_tokens - LEAD_TOKENS
    return max(_LEAST_CHUNK, min(wanted, room))
