"""kvpress's presses, each with a budget that it meets exactly. Needs the environment that `scripts/peers` makes."""

import contextlib
import importlib
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from compresskv.errors import ConfigError, ModelError, first_line
from compresskv.models.decoding import prefill
from compresskv.models.place import devices_of
from compresskv.models.shape import decoder_config, heads_of
from compresskv.peers.press_cache import PressCache
from compresskv.system.check import check_known
from compresskv.system.clock import now

PRESSES = (
    "SnapKVPress",
    "ExpectedAttentionPress",
    "KnormPress",
    "ChunkKVPress(SnapKVPress)",
    "FinchPress",
    "AdaKVPress(SnapKVPress)",
    "AdaKVPress(ExpectedAttentionPress)",
    "CriticalAdaKVPress(SnapKVPress)",
    "KVzipPress",
)
"""Outer(Inner), each with kvpress's own defaults. The first five free memory; the others mask, so they hold
the whole prompt, KVzipPress twice until the next token: its keys are views that keep its own replay alive."""


def check_presses(names: Iterable[str]) -> None:
    """Refuse presses that the peers' process cannot run. Needs no kvpress.

    Raises:
        ConfigError: naming the first that is unknown.
    """
    for name in names:
        check_known("peers", name, PRESSES)


def method_name(press: str) -> str:
    """What records call a press."""
    return f"kvpress:{press}"


@dataclass(frozen=True)
class Press:
    """One of kvpress's presses."""

    name: str

    @property
    def _kind(self) -> str:
        return self.name.partition("(")[0]

    @torch.no_grad()
    def compress(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        input_ids: Tensor,
        budget: int,
        question_start: int | None = None,
    ) -> PressCache:
        """Read the tokens (1, T) and compress what they left in the cache.

        Args:
            budget: tokens to retain per KV head, mean over layers and heads; T or more: all.
            question_start: the question's first token; only FinchPress, which scores by it, needs one.
        Raises:
            ConfigError: the budget is below 1 or below one of ChunkKVPress's chunks, or FinchPress has no question.
            ModelError: the press did not retain what it was asked to.
        """
        num_tokens = input_ids.shape[1]
        press = self._press(model, num_tokens, budget)
        if self._kind == "FinchPress":
            input_ids = _mark_question(press, input_ids, question_start)
        devices = devices_of(model)
        cache, hooks_s = DynamicCache(), _time_hook(press, devices)
        with _tokenizer_on_disk(model, tokenizer) if self._kind == "KVzipPress" else contextlib.nullcontext():
            with press(model):
                start = now(*devices)  # not before: KVzipPress loads a tokenizer on its way in
                logits = prefill(model, input_ids, cache)
                read, in_hooks_s = now(*devices), sum(hooks_s)
            done = now(*devices)
        next_position = cache.get_seq_length() if getattr(press, "rerotate_keys", False) else num_tokens
        prefill_s, select_s = read - start - in_hooks_s, done - read + in_hooks_s
        compressed = PressCache(model, cache, num_tokens, next_position, logits, prefill_s, select_s)
        self._check_retained(compressed.retained_tokens, min(budget, num_tokens))
        return compressed

    def _press(self, model: PreTrainedModel, num_tokens: int, budget: int) -> Any:
        kvpress = _kvpress()
        inner = self.name.rstrip(")").partition("(")[2]
        kind = getattr(kvpress, self._kind)
        press = kind(press=getattr(kvpress, inner)()) if inner else kind()
        if budget < 1:
            raise ConfigError(f"budget={budget} must be at least 1 token")
        if budget < num_tokens:
            press.compression_ratio = self._ratio(model, press, num_tokens, budget)
        return press

    def _ratio(self, model: PreTrainedModel, press: Any, num_tokens: int, budget: int) -> float:
        """The share to remove. Presses round down what they keep or remove; the half keeps that away from an edge."""
        if self._kind == "KVzipPress":  # rounds once, over all layers and heads
            config = decoder_config(model)
            num_pairs: int = config.num_hidden_layers * heads_of(config, 0).num_kv_heads
            return (num_pairs * (num_tokens - budget) + 0.5) / (num_pairs * num_tokens)
        if self._kind == "ChunkKVPress":
            num_kept: int = budget // press.chunk_length
            if num_kept == 0:
                raise ConfigError(f"budget={budget} is below one of ChunkKVPress's chunks of {press.chunk_length}")
            num_chunks: int = math.ceil(num_tokens / press.chunk_length)
            return 1 - (num_kept + 0.5) / num_chunks
        return 1 - (budget + 0.5) / num_tokens

    def _check_retained(self, retained: float, budget: int) -> None:
        # ChunkKVPress keeps whole chunks, of which the prompt's last is shorter: it cannot meet every budget.
        if retained > budget + 1e-6 or (retained < budget - 1e-6 and self._kind != "ChunkKVPress"):
            raise ModelError(f"{self.name} retained {retained:g} tokens at budget={budget}")


def find_press(name: str) -> Press:
    """A press by name.

    Raises:
        ConfigError: unknown; or this environment has no kvpress.
    """
    check_presses([name])
    _kvpress()
    return Press(name)


def _kvpress() -> Any:
    try:
        kvpress = importlib.import_module("kvpress")
    except ImportError as err:
        raise ConfigError(
            f"kvpress cannot be imported ({first_line(err)}); scripts/peers makes an environment that has it"
        ) from err
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzipPress tells at each use that it is slow
    return kvpress


def _mark_question(press: Any, input_ids: Tensor, question_start: int | None) -> Tensor:
    """Put FinchPress's delimiter before the question: any token that the prompt lacks, for the press takes it out."""
    if question_start is None or not 0 < question_start < input_ids.shape[1]:
        raise ConfigError("FinchPress scores by the question, so it needs one in what it compresses")
    used = set(input_ids[0].tolist())
    press.delimiter_token_id = next(token for token in range(len(used) + 1) if token not in used)
    delimiter = input_ids.new_tensor([[press.delimiter_token_id]])
    return torch.cat([input_ids[:, :question_start], delimiter, input_ids[:, question_start:]], dim=1)


def _time_hook(press: Any, devices: tuple[torch.device, ...]) -> list[float]:
    """Let the press's hook note the seconds of each call in the list that is returned."""
    hook, seconds = press.forward_hook, list[float]()

    def timed(*args: Any) -> Any:
        start = now(*devices)
        output = hook(*args)
        seconds.append(now(*devices) - start)
        return output

    press.forward_hook = timed
    return seconds


@contextlib.contextmanager
def _tokenizer_on_disk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """KVzipPress loads a tokenizer from where its model came from, which for ours may be a name or a GGUF file."""
    config: Any = model.config
    name = config._name_or_path
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config._name_or_path = folder
        try:
            yield
        finally:
            config._name_or_path = name
