"""A document becomes a compressed cache: in one pass, in chunks, or in parts that are cut one after another."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from compresskv import defaults
from compresskv.attention.routing import routing
from compresskv.cache.cache import CompressedCache
from compresskv.cache.costs import costs_of, tokens_kept
from compresskv.errors import ConfigError, PromptError
from compresskv.methods.base import Method
from compresskv.models.decoding import prefill
from compresskv.models.place import input_device
from compresskv.plans.capture import CapturedPrompt, read_twice
from compresskv.plans.plan import prompt_digest
from compresskv.prompts.prompt import context_length
from compresskv.selection.budgets import Budget, is_share, of_part
from compresskv.selection.byte_budget import find_byte_budget
from compresskv.selection.precision import NATIVE, find_precision
from compresskv.sessions.progress import OnRead, telling
from compresskv.system.check import check_count

_LEAST_ROOM = 256
"""Tokens that a document must leave of the model's context: for a question and its answer."""
_LEAST_PART = 64
"""Tokens of which something can be chosen."""
_REPLAY = 3
"""Full caches of a part that a method holds at most which reads it twice: its own, and what it reads again."""


def read_and_cut(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    method: Method,
    budget: Budget,
    *,
    store: str = NATIVE,
    chunk: int | None = None,
    max_memory: int | None = None,
    candidates: int | None = defaults.CANDIDATES,
    on_read: OnRead | None = None,
) -> CompressedCache:
    """Read a document and cut it.

    Args:
        store, candidates: as for `compressing`.
        chunk: tokens to read at a time; None: all at once. What is kept is the same up to rounding: nothing is evicted
            before all was read.
        max_memory: bytes that keys and values may take meanwhile; where the document's need more, it is read in parts,
            and each is cut before the next is read.
        on_read: called with (steps done, steps).
    Raises:
        ConfigError: the method looks ahead, or a value cannot work.
    """
    if method.lookahead:
        raise ConfigError(f"lookahead={method.lookahead}: a document is cut before anything is asked")
    check_count("chunk", chunk, or_none=True)
    check_count("max_memory", max_memory, or_none=True)
    total = len(token_ids)
    cache = CompressedCache(model, method, budget, store=store, candidates=candidates)
    if isinstance(budget, str):
        tokens_kept(model, budget, total, store)  # refuses what has no room, before it is read
    step = total if max_memory is None else _part_tokens(model, method, budget, store, total, max_memory)
    parts = [token_ids[start : start + step] for start in range(0, total, step)]
    num_read = sum(_num_read(method, len(part), later=number > 0) for number, part in enumerate(parts))
    with routing(model), telling(model, num_read, on_read):
        for part in parts:
            _read_part(model, cache, part, method, of_part(budget, len(part), total), None, chunk)
        cache.check_attended()
    return cache


def read_on(
    model: PreTrainedModel,
    cache: CompressedCache,
    token_ids: Sequence[int],
    method: Method,
    budget: Budget,
    *,
    chunk: int | None = None,
    on_read: OnRead | None = None,
) -> None:
    """Read more of a document, and cut it so that the whole is within the budget.

    Every part has the share of the budget that it has of the tokens. So a share of the document leaves earlier parts as
    they are; of a count, they get less, and lose their weakest tokens: see `Part`.

    Args:
        budget: of the whole document.
        chunk, on_read: as for `read_and_cut`.
    """
    before, num_new = cache.get_seq_length(), len(token_ids)
    left = None if is_share(budget) else _left(model, cache, budget, before / (before + num_new))
    with routing(model), telling(model, _num_read(method, num_new, later=True), on_read):
        _read_part(model, cache, token_ids, method, of_part(budget, num_new, before + num_new), left, chunk)
        cache.check_attended()


def _left(model: PreTrainedModel, cache: CompressedCache, budget: Budget, share: float) -> list[float]:
    """How much of its tokens each layer keeps to be within its share of a count of tokens or bytes: alike where the
    method shared it out.
    """
    layers = cache.compressed_layers
    if isinstance(budget, str):
        found, fixed = find_byte_budget(budget), costs_of(model, layers[0].precision).fixed
        assert found is not None
        nbytes = sum(layer.retained_nbytes for layer in layers)
        left = [(share * (found.count or 0) - fixed) / (nbytes - fixed)] * len(layers)
    else:
        held = [layer.mean_retained for layer in layers]
        if isinstance(budget, (int, float)):
            left = [share * budget * len(layers) / sum(held)] * len(layers)
        else:
            left = [share * count / own for count, own in zip(budget, held, strict=True)]
    return [min(1.0, max(0.0, own)) for own in left]


def _read_part(
    model: PreTrainedModel,
    cache: CompressedCache,
    token_ids: Sequence[int],
    method: Method,
    budget: Budget,
    left: Sequence[float] | None,
    chunk: int | None,
) -> None:
    """Read what comes next and cut it, inside `routing`.

    A method that reads twice does so with the cache itself where it is the document's beginning; else it reads the part
    by itself first, and the part then attends to what is kept.
    """
    step = len(token_ids) if chunk is None else chunk
    chunks = [list(token_ids[start : start + step]) for start in range(0, len(token_ids), step)]
    begins, replayed = cache.get_seq_length() == 0, None
    if method.replays and not begins:
        captured = CapturedPrompt(model, 1)
        for one in chunks:
            captured.read(one)
        replayed = captured.replayed
        del captured
    cache.begin_part(model, len(token_ids), method, budget, left=left, replayed=replayed)
    if method.replays and begins:
        read_twice(model, chunks, cache)
        return
    for one in chunks:
        prefill(model, torch.tensor([one], device=input_device(model)), cache)


def _num_read(method: Method, num_tokens: int, *, later: bool) -> int:
    """Tokens that pass through the model while a part is read."""
    return num_tokens * (1 + method.replays * (1 + later))


def _part_tokens(
    model: PreTrainedModel, method: Method, budget: Budget, store: str, total: int, max_memory: int
) -> int:
    """Tokens of each part, so that it fits, whole, beside what is kept of all that came before.

    Raises:
        ConfigError: what is kept alone takes more.
    """
    costs = costs_of(model, find_precision(store))
    reading = costs.full * (_REPLAY if method.replays else 1)
    if total * reading <= max_memory:
        return total
    if not method.evicts:
        kept = total
    else:
        each = [budget] if isinstance(budget, (int, float, str)) else budget
        kept = max(tokens_kept(model, one, total, store) for one in each)
    room = (max_memory - kept * costs.held - costs.fixed) // reading
    if room < _LEAST_PART:
        needed = kept * costs.held + costs.fixed + _LEAST_PART * reading
        problem = f"is too little: what is kept and the least part of {total:,} tokens need {needed:,} bytes"
        raise ConfigError(problem, option="max_memory", value=max_memory)
    return -(-total // -(-total // room))


def held_by(cache: CompressedCache, token_ids: list[int]) -> dict[str, Any]:
    """The part of `Facts` that a document's cache tells."""
    layers = cache.compressed_layers
    return {
        "num_tokens": len(token_ids),
        "sha256": prompt_digest(token_ids),
        "mean_retained": sum(layer.mean_retained for layer in layers) / len(layers),
        "kv_nbytes": cache.retained_nbytes,
        "kv_nbytes_full": cache.full_nbytes,
    }


def check_length(model: PreTrainedModel, num_tokens: int) -> None:
    """Refuse a document that leaves no room for a question.

    Raises:
        PromptError: naming both numbers.
    """
    limit = context_length(model)
    if limit is not None and num_tokens + _LEAST_ROOM > limit:
        raise PromptError(
            f"the document has {num_tokens} tokens, but of the model's context of {limit}, {_LEAST_ROOM} are needed "
            "for a question and its answer: shorten it"
        )
