"""The scheduler's part: chunks that end with the prompt, and blocks given back when it has been read."""

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from compresskv.errors import ConfigError, ServingError
from compresskv.selection.cuts import most_held
from compresskv.serving.blocks import CompressedAttentionManager
from compresskv.serving.counters import counters
from compresskv.serving.room import max_observed_tokens
from compresskv.serving.settings import EvictionSpec, PlannedEviction, find_settings
from compresskv.serving.versions import check_hooks

_LOG_INTERVAL_S = 10.0

logger = logging.getLogger("vllm.compresskv")

check_hooks(Scheduler)


class CompressedScheduler(Scheduler):
    """vLLM's scheduler for prompts that are cut at the end of prefill.

    It alone decides what is evicted, and gives blocks back only once that is certain. Workers do as they are told.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = find_settings(self.vllm_config.additional_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if settings is None or len(managers) != 1 or not isinstance(managers[0], CompressedAttentionManager):
            kinds = ", ".join(type(manager).__name__ for manager in managers)
            raise ServingError(f"compresskv inside vLLM: KV cache groups ({kinds}) are not one of full attention")
        self._settings = settings
        self._manager = managers[0]
        self._ending: dict[str, EvictionSpec] = {}
        """The prompts that the step under way may end."""
        self._max_observed = max_observed_tokens(self.vllm_config.model_config)
        self._reasons: Counter[str] = Counter()  # why prompts were kept whole
        self._logged_at = -math.inf  # the first cut is told at once
        self._has_news = False
        counters()  # makes their file now, while its folder is surely there

    def add_request(self, request: Any) -> None:
        """Queue a request, and decide how it is cut."""
        if request.request_id not in self.requests:  # else it adds to a streaming session
            request.compresskv_specs = self._decide(request)
            self._limit_answer(request)
        super().add_request(request)

    def _decide(self, request: Any) -> tuple[EvictionSpec, ...]:
        num_prompt, extra_args = request.num_prompt_tokens, request.sampling_params.extra_args
        try:
            specs = self._settings.eviction_specs(num_prompt, extra_args)
        except ConfigError:  # the server has refused it unless requests come another way
            self._keep_whole("bad budget")
            specs = ()
        if specs and request.resumable:
            self._keep_whole("streaming session")
            return ()
        if self._fits(specs, num_prompt):
            return specs
        if self._fits((), num_prompt):
            self._keep_whole("no room for a copy in the pool")
            return ()
        self._has_news = True
        self._reasons["no room for what it asked for, cut as all others"] += 1
        return self._settings.eviction_specs(num_prompt, None)

    def _fits(self, specs: Sequence[EvictionSpec], num_prompt: int) -> bool:
        """Whether the whole pool has room for the prompt: else it would wait for ever."""
        return self._manager.num_needed(specs, num_prompt) <= self._manager.num_usable

    def _limit_answer(self, request: Any) -> None:
        """End an answer where the pool is full, as vLLM ends it where the model's longest length is reached.

        That is where prompts may be longer than the pool: vLLM refuses to start with others.
        """
        if self._settings.chunks is None:
            return
        held = request.num_prompt_tokens - _num_lost(request.compresskv_specs)
        room = self._manager.num_usable * self.block_size - held
        request.max_tokens = max(1, min(request.max_tokens, room))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step."""
        self._ending.clear()
        return super().schedule(*args, **kwargs)

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Cached blocks of the prompt, up to the last chunk before its first cut: the window has to be computed."""
        blocks, num_local, *others = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        if request.compresskv_specs:
            first: EvictionSpec = request.compresskv_specs[0]
            if num_local > (most := first.num_read - first.last_chunk):
                num_local = most // self.block_size * self.block_size
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_local)
        return blocks, num_local, *others

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """No chunk goes beyond a cut, and the chunk that reaches it holds the whole observation window.

        Returns: tokens to read in this step; 0 where the window does not fit any more, so that the request waits.
        """
        num_new: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        spec = self._next_cut(request, num_computed_tokens)
        if spec is None:
            return num_new
        num_left = spec.num_read - num_computed_tokens
        ends = num_new >= num_left and self._may_end(spec)
        self._manager.prepare(request.request_id, spec if ends else None, _most_tokens(request))
        if ends:
            self._ending[request.request_id] = spec
            return num_left
        self._ending.pop(request.request_id, None)
        return max(0, min(num_new, num_left - spec.last_chunk))

    def _next_cut(self, request: Any, num_computed_tokens: int) -> EvictionSpec | None:
        """The next cut of a request; what it holds then is more than planned where an earlier one was not made."""
        specs: tuple[EvictionSpec, ...] = request.compresskv_specs
        spec = next((spec for spec in specs if spec.num_read > num_computed_tokens), None)
        if spec is None or spec is specs[0]:
            return spec
        return replace(spec, num_held=spec.num_read - self._manager.num_evicted.get(request.request_id, 0))

    def _may_end(self, spec: EvictionSpec) -> bool:
        """Whether what is noted of the prompt's tokens fits beside the step's other cuts; one always does."""
        others = sum(other.num_held for other in self._ending.values())
        return not others or others + spec.num_held <= self._max_observed

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Give back the blocks of prompts that this step reads up to a cut.

        The workers compact the cache in this very step, after its forward pass; new owners write in a later one.
        """
        super()._update_after_schedule(scheduler_output)
        scheduler_output.compresskv_evictions = planned = {}  # no field of vLLM's, but it is sent with them
        for request_id, spec in self._ending.items():
            num_scheduled = scheduler_output.num_scheduled_tokens.get(request_id, 0)
            if not num_scheduled:  # there was no room, or it was preempted
                continue
            request = self.requests[request_id]
            ends = request.num_computed_tokens == spec.num_read and num_scheduled >= spec.last_chunk
            evicted = self._manager.evict(request_id, spec) if ends else None
            if evicted is None:
                self._manager.keep(request_id)
                self._keep_whole("its last step could not be cut")
                continue
            targets, num_freed = evicted
            planned[request_id] = PlannedEviction(spec, targets)
            self._count(spec, num_freed, is_last=spec.num_read == request.compresskv_specs[-1].num_read)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
        """After a step, in which the workers have cut what it read to the end."""
        outputs = super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)
        if self._has_news:
            self._log(may_wait=self.has_unfinished_requests())
        return outputs

    def shutdown(self) -> None:
        """Tell of the last cuts, if requests were still running."""
        self._log(may_wait=False)
        super().shutdown()

    def _count(self, spec: EvictionSpec, num_freed: int, *, is_last: bool) -> None:
        self._has_news = True
        counts = counters()
        counts.add("evicted_prompts", is_last)
        counts.add("evicted_tokens", spec.num_held - spec.num_kept)
        counts.add("freed_blocks", num_freed)

    def _keep_whole(self, reason: str) -> None:
        self._has_news = True
        self._reasons[reason] += 1
        counters().add("whole_prompts", 1)

    def _log(self, *, may_wait: bool) -> None:
        """One line, if there is news: now and then while requests run (`may_wait`), and when none is left."""
        now = time.monotonic()
        if not self._has_news or (may_wait and now - self._logged_at < _LOG_INTERVAL_S):
            return
        logger.info("%s", told(counters().totals(), self._reasons))
        self._logged_at, self._has_news = now, False


class CompressedAsyncScheduler(CompressedScheduler, AsyncScheduler):
    """The same, where a step is planned before the one in front of it has come back.

    What a prompt keeps is known from its length and the settings alone, and the device works in one order: a block that
    is given back in a step has another owner in a later one.
    """


def _num_lost(specs: Sequence[EvictionSpec]) -> int:
    """Tokens that are gone when a prompt has been read."""
    return specs[-1].num_lost if specs else 0


def _most_tokens(request: Any) -> int:
    """What a request holds at once until it has been read, what it generated before it was preempted included."""
    specs: tuple[EvictionSpec, ...] = request.compresskv_specs
    in_the_end: int = request.num_tokens - _num_lost(specs)
    return max(most_held(request.num_prompt_tokens, specs), in_the_end)


def told(totals: dict[str, float], reasons: Counter[str]) -> str:
    """The line that the log has about what was evicted so far.

    Args:
        reasons: why prompts were kept whole that should have been cut, and how many.
    """
    line = (
        "compresskv: {evicted_prompts:.0f} prompts cut, {evicted_tokens:.0f} tokens evicted, {freed_blocks:.0f} blocks "
        "freed, {scoring_seconds:.2f} s of scoring, {compaction_seconds:.2f} s of compaction so far"
    ).format(**totals)
    if reasons:
        line += (
            f"; {reasons.total()} prompts kept whole ({', '.join(f'{reason}: {n}' for reason, n in reasons.items())})"
        )
    if totals["unscored_prompts"]:
        line += f"; {totals['unscored_prompts']:.0f} prompts cut by position alone, for scoring failed"
    return line
