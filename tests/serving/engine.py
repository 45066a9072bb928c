"""A vLLM engine under test, and what is looked up in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from compresskv.models.embedded import ensure_embedded
from compresskv.serving import plugin
from compresskv.serving.compaction import Compaction
from compresskv.serving.tap import EndingPrompt

_alive: list[LLM] = []

BLOCK_SIZE = 128
"""What vLLM takes on CPUs by itself; tests count on it."""

SHIPS_LOG = Path(__file__).parents[2] / "examples" / "ships_log.txt"


@dataclass
class Answer:
    """A greedy answer."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token of the answer."""


class Engine:
    """An engine with the embedded model in float32."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.positions: list[list[int]] = []
        """What each cut kept, in their order: true positions."""
        self.kept: dict[str, tuple[int, list[int]]] = {}
        """The tokens that each request's last cut had read, and what it kept."""
        self.max_running = 0
        engine_core: Any = llm.llm_engine.engine_core
        self.core = engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.num_free = self.pool.get_num_free_blocks()

    @property
    def vllms_runner_class(self) -> Any:
        """vLLM's own, which ours is made from: one of two of the same name."""
        (own,) = (kind for kind in type(self.runner).__mro__ if kind.__name__ == "GPUModelRunner")
        return own

    @property
    def is_v2(self) -> bool:
        """Whether it is vLLM's second."""
        return bool(self.llm.llm_engine.vllm_config.use_v2_model_runner)

    def note_positions(self) -> None:
        """Note what is kept of each prompt from now on."""
        compaction: Compaction = self.runner.compaction
        evict = compaction.evict

        def noting(prompt: EndingPrompt, targets: torch.Tensor) -> torch.Tensor:
            chosen, spec = evict(prompt, targets), prompt.spec
            is_first = spec.num_held == spec.num_read
            num_read, kept = (0, []) if is_first else self.kept[prompt.request_id]
            held = [*kept, *range(num_read, num_read + spec.num_candidates - len(kept))]
            self.positions.append([held[place] for place in chosen.tolist()])
            self.kept[prompt.request_id] = num_read + spec.num_candidates - len(kept), self.positions[-1]
            return chosen

        compaction.evict = noting  # type: ignore[method-assign]

    def add(self, prompt: Sequence[int], max_tokens: int, request_id: str, budget: Any = None, **sampling: Any) -> None:
        """Queue a request."""
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=not self.llm.llm_engine.model_config.skip_tokenizer_init,
            logprobs=0,
            extra_args=None if budget is None else {"compresskv": budget},
            **sampling,
        )
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, params)

    def step(self) -> list[RequestOutput]:
        """Run one step."""
        outputs = self.llm.llm_engine.step()
        self.max_running = max(self.max_running, len(self.scheduler.running))
        return outputs

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: int = 40, budget: Any = None, **sampling: Any
    ) -> list[Answer]:
        """Answers to prompts that are asked at once; the pool must be whole before and after."""
        self.positions.clear()
        self.kept.clear()
        self.max_running = 0
        assert self.pool.get_num_free_blocks() == self.num_free
        for number, prompt in enumerate(prompts):
            self.add(prompt, max_tokens, str(number), budget, **sampling)
        finished: dict[str, RequestOutput] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            finished |= {output.request_id: output for output in self.step() if output.finished}
        self.check_clean()
        return [answer_of(finished[str(number)]) for number in range(len(prompts))]

    def worker_blocks(self, number: int) -> list[int]:
        """Blocks that the worker has for the request that was added with this id."""
        (request_id,) = (name for name in self.scheduler.requests if name.split("-")[0] == str(number))
        blocks: list[int] = self.runner.block_ids_of(request_id).tolist()
        return blocks

    def preempt(self, request: Any) -> None:
        """Preempt a running request, as vLLM does between steps; what is under way of it is not heard of again."""
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        self.scheduler.prev_step_scheduled_req_ids.clear()

    def check_clean(self) -> None:
        """Every block is back, and nothing is remembered of any request."""
        while self.core.batch_queue:  # steps that were planned before their requests ended
            self.step()
        assert self.pool.get_num_free_blocks() == self.num_free
        manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        assert not manager.req_to_blocks
        for name in ("num_evicted", "_fresh", "_num_wanted"):
            assert not getattr(manager, name, None)


def answer_of(output: RequestOutput) -> Answer:
    """A finished request's."""
    only = output.outputs[0]
    tokens = list(only.token_ids)
    return Answer(tokens, [step[token].logprob for step, token in zip(only.logprobs, tokens, strict=True)])


def start(compresskv: dict[str, Any] | None, *, asynchronous: bool = False, **options: Any) -> Iterator[Engine]:
    """An engine; `compresskv` goes to vLLM's additional_config.

    Args:
        asynchronous: schedule a step before the one in front of it has come back, as vLLM does on GPUs alone.
    """

    def configure(config: Any, configure: Any = plugin.configure) -> None:
        config.scheduler_config.async_scheduling = asynchronous
        configure(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "configure", configure)
        llm = LLM(**engine_options(compresskv, **options))
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == asynchronous
    keep_alive(llm)
    engine = Engine(llm)
    if getattr(engine.runner, "compaction", None) is not None:
        engine.note_positions()
    yield engine


def keep_alive(llm: LLM) -> None:
    """Keep an engine to the end: one that is let go ends the process groups, which all engines of a process share."""
    _alive.append(llm)


def engine_options(compresskv: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    """What the tests' engines have in common."""
    return {
        "model": str(ensure_embedded("smollm2-135m")),
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 700,
        "kv_cache_memory_bytes": 400_000_000,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "seed": 0,
        "additional_config": {} if compresskv is None else {"compresskv": compresskv},
        **options,
    }
