"""Ask a document one question: prefill, evict, decode greedily, and say what it cost."""

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from compresskv import memory
from compresskv.budgets import Budget, check_budget
from compresskv.compression import DEFAULT_BUDGET, DEFAULT_METHOD, Compressing, prepare_method
from compresskv.method import Method
from compresskv.profiles.profile import Profile
from compresskv.prompts import build_prompt, room_for_prompt


@dataclass(frozen=True)
class GenerationStats:
    """What one answer cost. Seconds end in `_s`, bytes are `nbytes`."""

    method: str
    budget: int | float | list[int]
    prompt_tokens: int
    truncated_tokens: int
    """Document tokens cut out to make the prompt fit."""
    generated_tokens: int
    retained_per_layer: list[float]
    """Prompt tokens kept per KV head in each full-attention layer: a mean where KV heads differ."""
    kv_nbytes_full: int
    """KV bytes of the whole prompt, before eviction."""
    kv_nbytes: int
    """KV bytes really held after eviction: of storages, not of views. With look-ahead, at the answer's end."""
    prefill_s: float
    time_to_first_token_s: float
    """Prefill, eviction, and choosing the first token."""
    decode_s: float
    """From the first token to the last."""
    peak_memory_nbytes: int
    """Of the process on a CPU, of the allocator on a GPU."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None where the answer has one token."""
        return (self.generated_tokens - 1) / self.decode_s if self.generated_tokens > 1 else None

    @property
    def retained_fraction(self) -> float:
        """Mean share of the prompt's tokens that was kept."""
        return sum(self.retained_per_layer) / (len(self.retained_per_layer) * self.prompt_tokens)


@dataclass(frozen=True)
class Generation:
    """An answer."""

    answer: str
    token_ids: list[int]
    """Generated tokens, the end-of-text token included where it came."""
    stats: GenerationStats

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answer": self.answer,
            "token_ids": self.token_ids,
            "stats": {
                **asdict(self.stats),
                "decode_tokens_per_s": self.stats.decode_tokens_per_s,
                "retained_fraction": self.stats.retained_fraction,
            },
        }


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    *,
    method: str | Method = DEFAULT_METHOD,
    budget: Budget = DEFAULT_BUDGET,
    profile: Profile | str | Path | None = None,
    max_new_tokens: int = 128,
    truncate: str = "never",
    on_text: Callable[[str], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Generation:
    """Answer `question` about `context` greedily, with a compressed KV cache.

    Args:
        method, budget, profile, options: as for `compressing`.
        max_new_tokens: the longest answer.
        truncate: 'never' refuses a prompt above the model's context, 'middle' cuts the document's middle.
        on_text: called with pieces of the answer as they come.
        on_prefill: called with (layers done, layers) while the prompt is read.
    Raises:
        ConfigError, ProfileError, ModelError: as for `compressing`.
        PromptError: an empty document or question, or a prompt that does not fit.
    """
    chosen = prepare_method(model, method, profile, **options)
    check_budget(budget)
    prompt = build_prompt(
        tokenizer, context, question, max_tokens=room_for_prompt(model, max_new_tokens), truncate=truncate
    )
    input_ids = prompt.input_ids.to(model.device)
    memory.reset_peak(model.device)
    with Compressing(model, chosen, budget, on_layer=on_prefill) as cache:
        start = time.perf_counter()
        logits = prefill(model, input_ids, cache)
        _synchronize(model.device)
        prefill_s = time.perf_counter() - start
        kv_nbytes = cache.nbytes
        first = int(logits.argmax())
        first_s = time.perf_counter() - start
        streamer = None if on_text is None else _CallbackStreamer(tokenizer, on_text)
        token_ids = decode(model, tokenizer, first, cache, max_new_tokens, streamer)
        decode_s = time.perf_counter() - start - first_s
        retained = [layer.mean_retained for layer in cache.compressed_layers]
        if chosen.lookahead:
            kv_nbytes = cache.nbytes
    stats = GenerationStats(
        method=chosen.name,
        budget=budget if isinstance(budget, (int, float)) else list(budget),
        prompt_tokens=input_ids.shape[1],
        truncated_tokens=prompt.num_truncated,
        generated_tokens=len(token_ids),
        retained_per_layer=retained,
        kv_nbytes_full=cache.full_nbytes,
        kv_nbytes=kv_nbytes,
        prefill_s=prefill_s,
        time_to_first_token_s=first_s,
        decode_s=decode_s,
        peak_memory_nbytes=memory.peak_nbytes(model.device),
    )
    answer = str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
    return Generation(answer, token_ids, stats)


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor, cache: Cache) -> Tensor:
    """Read the prompt (1, T) and return the last position's logits (vocab,)."""
    return last_logits(model, input_ids, cache)[0]


@torch.no_grad()
def decode_one_token(model: PreTrainedModel, token: int, cache: Cache) -> Tensor:
    """Feed one token and return the next position's logits (vocab,)."""
    return last_logits(model, torch.tensor([[token]], device=model.device), cache)[0]


@torch.no_grad()
def last_logits(model: PreTrainedModel, input_ids: Tensor, cache: Cache) -> Tensor:
    """Read tokens (B, T) and return the last position's logits (B, vocab): of no other are they computed."""
    last_only = {"logits_to_keep": 1} if _keeps_logits(type(model)) else {}  # type: ignore[arg-type]
    logits: Tensor = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **last_only).logits[:, -1]
    return logits


@functools.cache
def _keeps_logits(model_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    first: int,
    cache: Cache,
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> list[int]:
    """Continue greedily from the token `first` until the end-of-text token or `max_new_tokens`."""
    ends = end_tokens(model, tokenizer)
    token_ids = [first]
    while True:
        if streamer is not None:
            streamer.put(torch.tensor(token_ids[-1:]))
        if token_ids[-1] in ends or len(token_ids) >= max_new_tokens:
            break
        token_ids.append(int(decode_one_token(model, token_ids[-1], cache).argmax()))
    if streamer is not None:
        streamer.end()
    return token_ids


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}


class _CallbackStreamer(TextStreamer):
    """transformers' streamer, which holds text back until a word is whole, with a callback instead of print."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece of the answer."""
        if text:
            self._on_text(text)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
