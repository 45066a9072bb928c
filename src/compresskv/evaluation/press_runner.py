"""Run kvpress's presses on our cases, in the environment that `scripts/peers` makes.

kvpress needs an older transformers than ours may be.
"""

from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from compresskv.cache.costs import tokens_kept
from compresskv.errors import ConfigError, first_line
from compresskv.evaluation.fidelity import nearness
from compresskv.evaluation.press_request import PressCase, PressRequest
from compresskv.models.decoding import end_tokens, prefill
from compresskv.models.load import load
from compresskv.models.place import devices_of, input_device
from compresskv.peers.press_cache import PressCache, masks, put_masks
from compresskv.peers.presses import Press, find_press, method_name
from compresskv.selection.budgets import SharedBudget
from compresskv.system.clock import now
from compresskv.system.libraries import libraries

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def run_press(
    loaded: Loaded, press: Press, case: PressCase, budget: SharedBudget, setting: str, full: Tensor | None
) -> dict[str, Any]:
    """Compress, compare and decode one case.

    Args:
        full: as `full_log_probs` gives it.
    Returns: figures counted as `Runner` counts ours. In the agnostic setting only the first `compressed_tokens` are
        compressed; bytes are those after that, and tokens include the suffix, which is read afterwards.
    Raises:
        ConfigError: as for `Press.compress`, no token fits into a budget in bytes, or the prompt cannot be cut for the
            agnostic setting.
    """
    model, tokenizer = loaded
    input_ids = torch.tensor([case.input_ids], device=input_device(model))
    num_compressed = input_ids.shape[1] if setting == "aware" else _cut(case)
    context, suffix = input_ids[:, :num_compressed], input_ids[:, num_compressed:]
    num_retained = tokens_kept(model, budget, num_compressed)
    cache = press.compress(model, tokenizer, context, num_retained, case.suffix_start)
    if suffix.shape[1]:
        cache.read(suffix, last_only=True)
    near = None if full is None else nearness(log_probs(cache, case), full)
    devices = devices_of(model)
    start = now(*devices)
    token_ids = cache.decode(end_tokens(model, tokenizer), case.max_new_tokens)
    return {
        "token_ids": token_ids,
        "compressed_tokens": num_compressed,
        "logical_tokens": cache.retained_tokens + suffix.shape[1],
        "held_tokens": cache.held_tokens + suffix.shape[1],
        "kv_nbytes": cache.nbytes,
        "kv_nbytes_full": cache.nbytes_full,
        "prefill_s": cache.prefill_s,
        "select_s": cache.select_s,
        "decode_s": now(*devices) - start,
        "kl_divergence": None if near is None else near.kl_divergence,
        "top1_agreement": None if near is None else near.top1_agreement,
    }


def _cut(case: PressCase) -> int:
    if case.suffix_start is None or not 0 < case.suffix_start < len(case.input_ids):
        raise ConfigError("the prompt has no suffix to hold back, which the agnostic setting needs")
    return case.suffix_start


def full_log_probs(model: PreTrainedModel, case: PressCase) -> Tensor | None:
    """What the full cache thinks, in this environment, at each step of its own answer; see `Reference.log_probs`.

    None where there is no answer of two tokens.
    """
    if len(case.reference_ids) < 2:
        return None
    put_masks(masks(model), on=False)  # the last press left them
    cache, num_tokens = DynamicCache(), len(case.input_ids)
    logits = prefill(model, torch.tensor([case.input_ids], device=input_device(model)), cache)
    return log_probs(PressCache(model, cache, num_tokens, num_tokens, logits, 0.0, 0.0), case)


def log_probs(cache: PressCache, case: PressCase) -> Tensor:
    """(n - 1, vocab) float32: of the tokens of the full cache's answer after the first."""
    return cache.teacher_forced(case.reference_ids).float().log_softmax(dim=-1)


def answer(request: PressRequest) -> Iterator[dict[str, Any]]:
    """Every case, setting, press and budget that is not done: a result, or what went wrong with it.

    Returns: rows with the names that `Record` has; one that failed has 'error' instead of figures.
    Raises:
        ConfigError, ModelError: nothing can be run at all.
    """
    presses = {name: find_press(name) for name in request.presses}
    loaded = load(request.model, dtype=request.dtype, device=request.device)
    versions = {**libraries(), "kvpress": version("kvpress")}

    @lru_cache(maxsize=1)
    def full(number: int) -> Tensor | None:
        return full_log_probs(loaded[0], request.cases[number])

    for number, case in enumerate(request.cases):
        for setting, press, budget in request.pending(case):
            row: dict[str, Any] = {"task": case.task, "example": case.example, "method": method_name(press)}
            row |= {"budget": budget, "setting": setting}
            try:
                figures = run_press(loaded, presses[press], case, budget, setting, full(number))
                counted = figures["logical_tokens" if request.peer_budget == "tokens" else "held_tokens"]
                yield row | {"retained_tokens": counted} | figures | {"versions": versions}
            except Exception as err:  # noqa: BLE001 - kvpress raises of all kinds, and other cases may still work
                yield row | {"error": first_line(err)}
