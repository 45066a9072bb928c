"""The parts of `scripts/check-serving-gpu`, each with an engine of its own, as vLLM sets it up by itself."""

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import compresskv
from compresskv.models.embedded import EMBEDDED, ensure_embedded
from compresskv.peers.engines import Engine

_NUM_TOKENS = 64  # of each answer that is compared
_LENGTHS = (700, 1500, 2600)  # tokens of the prompts that are compared
_SHARE_BESIDE = 0.4  # of a GPU's memory for vLLM, where transformers computes beside it


def starts(task: dict[str, Any]) -> dict[str, Any]:
    """Whether an engine with the plugin starts and answers, and of what it is made."""
    started = time.perf_counter()
    engine, text = _engine(task, compressed=True, max_model_len=2048)
    started_s = time.perf_counter() - started
    engine.add("one", text[:1500], 20, None)
    num_tokens = len(_answers(engine)["one"])
    return {"start_s": started_s, "num_tokens": num_tokens, **_made_of(engine), **_counted()}


def tokens(task: dict[str, Any]) -> dict[str, Any]:
    """Positions and tokens beside `compressing`'s, for the same prompts in the same dtype, one at a time."""
    engine, text = _engine(task, compressed=True, max_model_len=4096, dtype=task["dtype"], share=_SHARE_BESIDE)
    kept = _noted_positions(engine)
    prompts = [text[100:][:length] for length in _LENGTHS]
    answers = []
    for prompt in prompts:
        engine.add("one", prompt, _NUM_TOKENS, None)
        answers.append(_answers(engine)["one"])
    model, _ = compresskv.load(task["model"], dtype=task["dtype"])
    own = [_own(model, task, prompt) for prompt in prompts]
    return {
        **_made_of(engine),
        "same_positions": [
            len(set(mine) & set(theirs)) / len(mine) for (mine, _), theirs in zip(own, kept, strict=True)
        ],
        "same_tokens": [_agreeing(mine, theirs) for (_, mine), theirs in zip(own, answers, strict=True)],
        "num_tokens": _NUM_TOKENS,
    }


def load(task: dict[str, Any]) -> dict[str, Any]:
    """All requests at once; each has another part of the text."""
    length, new_tokens, num_requests = task["length"], task["new_tokens"], task["num_requests"]
    whole = length + new_tokens
    engine, text = _engine(task, compressed=task["compressed"], max_model_len=whole, pool=task["pool"])
    text = text * (1 + length // len(text))
    engine.add("warm", text[-length:], 8, None)
    _answers(engine)
    stride = max(1, (len(text) - length) // num_requests)
    for number in range(num_requests):
        engine.add(str(number), text[number * stride :][:length], new_tokens, None)
    requests = dict(engine.scheduler.requests)
    first_s: dict[str, float] = {}
    running: list[int] = []
    started = time.perf_counter()
    while engine.is_busy:
        for output in engine.step():
            first_s.setdefault(output.request_id, time.perf_counter() - started)
        running.append(len(engine.scheduler.running))
    wall_s = time.perf_counter() - started
    return {
        "wall_s": wall_s,
        "tokens_per_s": num_requests * new_tokens / wall_s,
        "first_token_s": statistics.mean(first_s.values()),
        "max_running": max(running),
        "num_steps": len(running),
        "num_preemptions": sum(request.num_preemptions for request in requests.values()),
        **_made_of(engine),
        **(_counted() if task["compressed"] else {}),
    }


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"starts": starts, "tokens": tokens, "load": load}


def _folder(task: dict[str, Any]) -> str:
    model = task["model"]
    return str(ensure_embedded(model)) if model in EMBEDDED else model


def _settings(task: dict[str, Any]) -> dict[str, Any]:
    own = {"budget": task["budget"], "method": task["method"]}
    own |= _chunks(task)
    return own | ({"profile": task["profile"]} if task["profile"] else {})


def _chunks(task: dict[str, Any]) -> dict[str, int]:
    """How prompts are cut while they are read; empty where they are not."""
    return {"chunk_budget": task["chunk_budget"]} if task.get("chunk_budget") else {}


def _engine(
    task: dict[str, Any],
    *,
    compressed: bool,
    max_model_len: int,
    dtype: str = "auto",
    pool: int = 0,
    share: float | None = None,
) -> tuple[Engine, list[int]]:
    """An engine of vLLM's own making, and the calibration text in tokens.

    Args:
        pool: whole requests that its pool holds; 0: vLLM's own pool.
        share: of a GPU's memory; None: vLLM's own choice.
    """
    from transformers import AutoTokenizer

    from compresskv.calibration.haystack import read_haystack
    from compresskv.serving.settings import plugins_with_ours

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.update(plugins_with_ours())
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    options: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 30} if on_cpu else {}  # else nearly all memory
    if pool:  # one block is vLLM's own
        options["num_gpu_blocks_override"] = 1 + pool * math.ceil(max_model_len / (128 if on_cpu else 16))
    if share and not on_cpu:
        options["gpu_memory_utilization"] = share
    llm = LLM(
        model=_folder(task),
        dtype=dtype,
        max_model_len=max_model_len,
        enforce_eager=task["eager"],
        seed=0,
        additional_config={"compresskv": _settings(task) if compressed else False},
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(_folder(task))
    return Engine(llm), tokenizer("\n\n".join(read_haystack(())), verbose=False)["input_ids"]


def _answers(engine: Engine) -> dict[str, list[int]]:
    """The tokens of all requests, once they are done."""
    found: dict[str, list[int]] = {}
    while engine.is_busy:
        found |= {output.request_id: list(output.outputs[0].token_ids) for output in engine.step()}
    return found


def _runner(engine: Engine) -> Any:
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def _made_of(engine: Engine) -> dict[str, Any]:
    """vLLM's parts that the plugin meets."""
    config = engine.llm.llm_engine.vllm_config
    layer = next(layer for layer in config.compilation_config.static_forward_context.values() if hasattr(layer, "impl"))
    return {
        "runner": next(kind.__module__ for kind in type(_runner(engine)).__mro__ if kind.__name__ == "GPUModelRunner"),
        "scheduler": type(engine.scheduler).__name__,
        "backend": type(layer.impl).__name__,
        "cuda_graphs": str(config.compilation_config.cudagraph_mode),
        "computed_in": str(config.model_config.dtype),
        "num_blocks": engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
    }


def _counted() -> dict[str, float]:
    from compresskv.serving.counters import counters

    return counters().totals()


def _noted_positions(engine: Engine) -> list[list[int]]:
    """Filled with what is kept of each prompt, in the end: true positions. For one prompt at a time."""
    noted: list[list[int]] = []
    compaction = _runner(engine).compaction
    evict, num_read = compaction.evict, 0

    def noting(prompt: Any, targets: Any) -> Any:
        nonlocal num_read
        places, spec = evict(prompt, targets), prompt.spec
        is_first = spec.num_held == spec.num_read
        begun, kept = (0, []) if is_first else (num_read, noted.pop())
        num_read = begun + spec.num_candidates - len(kept)
        held = [*kept, *range(begun, num_read)]
        noted.append([held[place] for place in places.tolist()])
        return places

    compaction.evict = noting
    return noted


def _own(model: Any, task: dict[str, Any], prompt: list[int]) -> tuple[list[int], list[int]]:
    """What `compressing` keeps of the prompt, and its answer."""
    import torch

    from compresskv.methods.registry import parse_methods
    from compresskv.models.decoding import decode_one_token, prefill
    from compresskv.models.place import input_device

    (method,) = parse_methods("method", task["method"]).values()
    exact: dict[str, Any] = {"candidates": None, "profile": task["profile"], **_chunks(task)}
    with compresskv.compressing(model, method, task["budget"], **exact) as cache:
        logits = prefill(model, torch.tensor([prompt], device=input_device(model)), cache)
        answer = [int(logits.argmax())]
        while len(answer) < _NUM_TOKENS:
            answer.append(int(decode_one_token(model, answer[-1], cache).argmax()))
        positions = cache.compressed_layers[0].positions
    assert positions is not None
    return positions[0, 0].tolist(), answer


def _agreeing(mine: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        if one != other:
            return number
    return len(mine)
