"""Run kvpress's presses on our cases: `python -m compresskv.evaluation.peers --request FILE`.

It runs in the environment that `scripts/peers` makes, because kvpress needs an older transformers than ours may be.
Each result is one line of JSON on stdout, written as soon as it is known.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.errors import ConfigError, first_line
from compresskv.evaluation.peer_request import PeerCase, PeerRequest
from compresskv.models.decoding import end_tokens
from compresskv.models.load import load
from compresskv.models.place import input_device
from compresskv.peers.answers import Write, answer_request
from compresskv.peers.press_cache import PeerCache
from compresskv.peers.press_names import method_name
from compresskv.peers.presses import Peer, peer
from compresskv.selection.budgets import resolve
from compresskv.system.clock import now

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def run_peer(loaded: Loaded, chosen: Peer, case: PeerCase, budget: int | float, setting: str) -> dict[str, Any]:
    """Compress, compare and decode one case.

    Returns: figures counted as `Runner` counts ours. In the agnostic setting only the first `compressed_tokens` are
        compressed; bytes are those after that, and tokens include the suffix, which is read afterwards.
    Raises:
        ConfigError: as for `Peer.compress`, or the prompt cannot be cut for the agnostic setting.
    """
    model, tokenizer = loaded
    input_ids = torch.tensor([case.input_ids], device=input_device(model))
    num_compressed = input_ids.shape[1] if setting == "aware" else _cut(case)
    context, suffix = input_ids[:, :num_compressed], input_ids[:, num_compressed:]
    cache = chosen.compress(model, tokenizer, context, resolve(budget, num_compressed), case.suffix_start)
    if suffix.shape[1]:
        cache.read(suffix, last_only=True)
    agreement = _top1_agreement(cache, case)
    start = now(model.device)
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
        "decode_s": now(model.device) - start,
        "top1_agreement": agreement,
    }


def _cut(case: PeerCase) -> int:
    if case.suffix_start is None or not 0 < case.suffix_start < len(case.input_ids):
        raise ConfigError("the prompt has no suffix to hold back, which the agnostic setting needs")
    return case.suffix_start


def _top1_agreement(cache: PeerCache, case: PeerCase) -> float | None:
    """As in `fidelity.fidelity`: over the full cache's own answer, its first token left out."""
    if len(case.reference_ids) < 2:
        return None
    choices = cache.teacher_forced(case.reference_ids).argmax(dim=-1)
    expected = torch.tensor(case.reference_ids[1:], device=choices.device)
    return float((choices == expected).float().mean())


def results(request: PeerRequest) -> Iterator[dict[str, Any]]:
    """Every case, setting, press and budget that is not done: a result, or what went wrong with it.

    Raises:
        ConfigError, ModelError: nothing can be run at all.
    """
    peers = {name: peer(name) for name in request.presses}
    loaded = load(request.model, dtype=request.dtype, device=request.device)
    versions = {name: version(name) for name in ("compresskv", "kvpress", "torch", "transformers")}
    pending = [(case, *config) for case in request.cases for config in request.pending(case)]
    for case, setting, press, budget in pending:
        row: dict[str, Any] = {"task": case.task, "example": case.example, "method": method_name(press)}
        row |= {"budget": budget, "setting": setting}
        try:
            figures = run_peer(loaded, peers[press], case, budget, setting)
            counted = figures["logical_tokens" if request.peer_budget == "tokens" else "held_tokens"]
            yield row | {"retained_tokens": counted} | figures | {"versions": versions}
        except Exception as err:  # noqa: BLE001 - kvpress raises of all kinds, and other cases may still work
            yield row | {"error": first_line(err)}


def main() -> int:
    """Answer the request on stdout."""
    return answer_request("Run kvpress's presses; one JSON line for each result.", "PeerRequest", _answer)


def _answer(request: Path, write: Write) -> None:
    for row in results(PeerRequest.read(request)):
        write(row)


if __name__ == "__main__":
    sys.exit(main())
