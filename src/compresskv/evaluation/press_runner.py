"""Run kvpress's presses on our cases, in the environment that `scripts/peers` makes.

kvpress needs an older transformers than ours may be.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.errors import ConfigError, first_line
from compresskv.evaluation.press_request import PressCase, PressRequest
from compresskv.models.decoding import end_tokens
from compresskv.models.load import load
from compresskv.models.place import devices_of, input_device
from compresskv.peers.press_cache import PressCache
from compresskv.peers.presses import Press, find_press, method_name
from compresskv.selection.budgets import resolve
from compresskv.system.clock import now

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def run_press(loaded: Loaded, press: Press, case: PressCase, budget: int | float, setting: str) -> dict[str, Any]:
    """Compress, compare and decode one case.

    Returns: figures counted as `Runner` counts ours. In the agnostic setting only the first `compressed_tokens` are
        compressed; bytes are those after that, and tokens include the suffix, which is read afterwards.
    Raises:
        ConfigError: as for `Press.compress`, or the prompt cannot be cut for the agnostic setting.
    """
    model, tokenizer = loaded
    input_ids = torch.tensor([case.input_ids], device=input_device(model))
    num_compressed = input_ids.shape[1] if setting == "aware" else _cut(case)
    context, suffix = input_ids[:, :num_compressed], input_ids[:, num_compressed:]
    cache = press.compress(model, tokenizer, context, resolve(budget, num_compressed), case.suffix_start)
    if suffix.shape[1]:
        cache.read(suffix, last_only=True)
    agreement = _top1_agreement(cache, case)
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
        "top1_agreement": agreement,
    }


def _cut(case: PressCase) -> int:
    if case.suffix_start is None or not 0 < case.suffix_start < len(case.input_ids):
        raise ConfigError("the prompt has no suffix to hold back, which the agnostic setting needs")
    return case.suffix_start


def _top1_agreement(cache: PressCache, case: PressCase) -> float | None:
    """As in `fidelity.fidelity`: over the full cache's own answer, its first token left out."""
    if len(case.reference_ids) < 2:
        return None
    choices = cache.teacher_forced(case.reference_ids).argmax(dim=-1)
    expected = torch.tensor(case.reference_ids[1:], device=choices.device)
    return float((choices == expected).float().mean())


def answer(request: PressRequest) -> Iterator[dict[str, Any]]:
    """Every case, setting, press and budget that is not done: a result, or what went wrong with it.

    Returns: rows with the names that `Record` has; one that failed has 'error' instead of figures.
    Raises:
        ConfigError, ModelError: nothing can be run at all.
    """
    presses = {name: find_press(name) for name in request.presses}
    loaded = load(request.model, dtype=request.dtype, device=request.device)
    versions = {name: version(name) for name in ("compresskv", "kvpress", "torch", "transformers")}
    pending = [(case, *config) for case in request.cases for config in request.pending(case)]
    for case, setting, press, budget in pending:
        row: dict[str, Any] = {"task": case.task, "example": case.example, "method": method_name(press)}
        row |= {"budget": budget, "setting": setting}
        try:
            figures = run_press(loaded, presses[press], case, budget, setting)
            counted = figures["logical_tokens" if request.peer_budget == "tokens" else "held_tokens"]
            yield row | {"retained_tokens": counted} | figures | {"versions": versions}
        except Exception as err:  # noqa: BLE001 - kvpress raises of all kinds, and other cases may still work
            yield row | {"error": first_line(err)}
