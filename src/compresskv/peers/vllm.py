"""Engines in this process, so that steps can be counted and timed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
    prefix_caching: bool = False,
) -> Engine:
    """An engine with or without the plugin; everything else is the same.

    Args:
        num_blocks: blocks of 128 tokens in the pool; None: what 2 GB hold.
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
        kv_cache_memory_bytes=2_000_000_000,
        num_gpu_blocks_override=None if num_blocks is None else num_blocks + 1,  # one is vLLM's own
        enable_prefix_caching=prefix_caching,
        enforce_eager=True,  # compiling each engine would take longer than the measurement
        seed=0,
        additional_config={"compresskv": {"budget": 1.0} if compressed else False},
    )
    _alive.append(llm)
    return Engine(llm)
