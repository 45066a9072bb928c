"""kvpress's presses as contenders, measured in the environment that `scripts/peers` makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskv.bench.config import stages
from compresskv.bench.contender import EAGER
from compresskv.bench.continuation import Continuation, Prefill
from compresskv.bench.peers import BenchRequest
from compresskv.bench.run import Bench
from compresskv.bench.subject import Subject, random_subject, real_subject
from compresskv.cache.costs import tokens_kept
from compresskv.errors import first_line
from compresskv.models.place import devices_of
from compresskv.peers.press_cache import Masks, masks, put_masks
from compresskv.peers.presses import find_press, method_name
from compresskv.selection.budgets import SharedBudget
from compresskv.selection.precision import NATIVE
from compresskv.system.clock import now

PRESSES = ("SnapKVPress", "AdaKVPress(SnapKVPress)")
"""One that frees what it evicts, and one that masks it and holds all."""


@dataclass(frozen=True)
class KVPress:
    """A press with its own defaults, at a budget."""

    name: str
    budget: SharedBudget
    max_prompt: None = None
    decode: str = EAGER
    store: str = NATIVE
    model: None = None

    @property
    def method(self) -> str:
        """As in records of evaluations."""
        return method_name(self.name)

    def start(self, model: PreTrainedModel, input_ids: Tensor) -> Continuation:
        """Read the tokens (1, T)."""
        num_tokens, devices = input_ids.shape[1], devices_of(model)
        num_retained = tokens_kept(model, self.budget, num_tokens, self.store)
        start = now(*devices)
        tokenizer: Any = None  # of these presses, none needs it
        cache = find_press(self.name).compress(model, tokenizer, input_ids, num_retained)
        first = int(cache.logits.argmax())
        figures = Prefill(
            prompt_tokens=num_tokens,
            held_tokens=cache.held_tokens,
            prefill_s=cache.prefill_s + cache.select_s,
            scoring_s=None,
            eviction_s=cache.select_s,
            num_scorings=None,
            first_token_s=now(*devices) - start,
            kv_nbytes=cache.nbytes,
        )
        left = masks(model)
        put_masks(left, on=False)

        def advance(token: int) -> int:
            step = torch.tensor([[token]], device=model.device)
            return int(cache.read(step, last_only=True).argmax())

        return Continuation(figures, first, advance, lambda: _masked(left))


@contextmanager
def _masked(left: Masks) -> Iterator[None]:
    """kvpress keeps the masks of a cache on the model's modules, where other caches would meet them: only inside."""
    put_masks(left, on=True)
    try:
        yield
    finally:
        put_masks(left, on=False)


def answer(request: BenchRequest) -> Iterator[dict[str, Any]]:
    """Measure presses beside plain transformers, stage by stage: progress, what failed, and rows at the end.

    Raises:
        ConfigError, ModelError: nothing can be run at all.
    """
    for name in PRESSES:
        find_press(name)  # refuses an environment without kvpress before a model is loaded
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    bench = Bench(_subject(request), request.config)
    all_stages = stages(request.config, lambda budget: [KVPress(name, budget) for name in PRESSES])
    for number, stage in enumerate(all_stages):
        yield {"message": f"{stage.length:,} tokens", "fraction": number / len(all_stages)}
        try:
            bench.run([stage], lambda message, fraction: None, engine="kvpress")
        except Exception as err:  # noqa: BLE001 - kvpress raises of all kinds, and other stages may still work
            yield {"length": stage.length, "error": first_line(err)}
    for row in bench.result()["rows"]:
        yield {**row, "versions": versions}


def _subject(request: BenchRequest) -> Subject:
    name, dtype, device = request.model, request.dtype, request.device
    if request.num_layers is None:
        subject = real_subject(name, dtype=dtype, device=device)
    else:
        subject = random_subject(name, request.num_layers, len(request.input_ids), dtype=dtype, device=device)
    tokens = torch.tensor([request.input_ids], device=subject.model.device)  # just what our methods read
    subject.read_tokens = lambda count: tokens[:, :count]
    return subject
