"""The scheduler's part: chunks that end with the prompt, and blocks given back when it has been read."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from compresskv.errors import ConfigError, ServingError
from compresskv.selection.cuts import most_held
from compresskv.serving.blocks import CompressedAttentionManager
from compresskv.serving.counters import counters
from compresskv.serving.ends import num_put, put_ends, with_ends
from compresskv.serving.room import max_observed_tokens
from compresskv.serving.settings import EvictionSpec, PlannedEviction, find_settings, requested_budget
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
        """The cuts that the step under way may make."""
        self._nearing: dict[str, EvictionSpec] = {}
        """Cuts of what is generated, whose observation window begins in the step under way."""
        self._max_observed = max_observed_tokens(self.vllm_config.model_config)
        self._reasons: Counter[str] = Counter()  # why something was not cut as asked
        self._logged_at = -math.inf  # the first cut is told at once
        self._has_news = False
        counters()  # makes their file now, while its folder is surely there

    def add_request(self, request: Any) -> None:
        """Queue a request, and decide how it is cut."""
        if request.request_id not in self.requests:  # else it adds to a streaming session
            request.compresskv_specs = specs = self._decide(request)
            if num_put(specs):
                put_ends(request, specs, self.max_model_len)
            request.compresskv_decodes = self._decide_decoding(request)
            request.compresskv_next = None
            request.compresskv_quiet = (0, 0)  # running, it has nothing to wait for between so many tokens
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
        for own in (with_ends(request, specs, self._settings, self.max_model_len), specs):
            if self._fits(own, num_prompt + num_put(own)):
                return own
        if self._fits((), num_prompt):
            self._keep_whole("no room for a copy in the pool")
            return ()
        self._has_news = True
        self._reasons["no room for what it asked for, cut as all others"] += 1
        return with_ends(request, self._settings.eviction_specs(num_prompt, None), self._settings, self.max_model_len)

    def _fits(self, specs: Sequence[EvictionSpec], num_prompt: int) -> bool:
        """Whether the whole pool has room for the prompt: else it would wait for ever."""
        return self._manager.num_needed(specs, num_prompt) <= self._manager.num_usable

    def _decide_decoding(self, request: Any) -> bool:
        """Whether what the request generates is cut."""
        if self._settings.decode is None or request.resumable or self._is_off(request):
            return False
        first = self._generated_cut(request, 0)
        most = max(first.num_held, self._settings.decode.budget + self._settings.decode.interval)
        moves = not request.compresskv_specs
        if self._manager.num_needed_to_generate(first, most, moves=moves) <= self._manager.num_usable:
            return True
        self._has_news = True
        self._reasons["no room for a copy of what was generated"] += 1
        return False

    def _is_off(self, request: Any) -> bool:
        """Whether the request asked to be kept whole, and is."""
        if request.compresskv_specs:
            return False
        try:
            return requested_budget(request.sampling_params.extra_args, self._settings.budget) is None
        except ConfigError:
            return True

    def _generated_cut(self, request: Any, num_read: int) -> EvictionSpec:
        num_prompt = request.num_prompt_tokens
        return self._settings.generated_spec(num_prompt, num_prompt - _num_lost(request.compresskv_specs), num_read)

    def _limit_answer(self, request: Any) -> None:
        """End an answer where the pool is full, as vLLM ends it where the model's longest length is reached.

        That is where prompts may be longer than the pool: vLLM refuses to start with others.
        """
        if self._settings.chunks is None or request.compresskv_decodes:
            return
        held = request.num_prompt_tokens - _num_lost(request.compresskv_specs)
        room = self._manager.num_usable * self.block_size - held
        request.max_tokens = max(1, min(request.max_tokens, room))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step."""
        self._ending.clear()
        self._nearing.clear()
        return super().schedule(*args, **kwargs)

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Cached blocks, up to the last chunk before the request's first cut: the window has to be computed."""
        blocks, num_local, *others = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        first = self._next_cut(request, 0)
        if first is not None and num_local > (most := first.num_read - max(first.last_chunk, first.window_size)):
            num_local = most // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_local)
        return blocks, num_local, *others

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """No chunk goes beyond a cut, and the chunk that reaches it holds the whole observation window.

        Returns: tokens to read in this step; 0 where the window does not fit any more, so that the request waits.
        """
        num_new: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.compresskv_quiet[0] <= request.num_computed_tokens < request.compresskv_quiet[1] - num_new:
            return num_new
        spec = self._next_cut(request, num_computed_tokens)
        is_running, first_observed = request.num_computed_tokens > 0, math.inf
        if spec is not None and spec.generated:
            first_observed = spec.num_read - spec.window_size
        if spec is None or (spec.generated and is_running and num_computed_tokens + num_new <= first_observed):
            if is_running:
                request.compresskv_quiet = (num_computed_tokens, first_observed + 1)
            return num_new
        num_left = spec.num_read - num_computed_tokens
        ends = num_new >= num_left and self._may_end(spec)
        self._manager.prepare(request.request_id, spec if ends else None, self._most_tokens(request))
        if ends:
            self._ending[request.request_id] = spec
            return num_left
        self._ending.pop(request.request_id, None)
        if spec.generated:
            self._nearing[request.request_id] = spec
        return max(0, min(num_new, num_left - spec.last_chunk))

    def _next_cut(self, request: Any, num_computed_tokens: int) -> EvictionSpec | None:
        """The next cut of a request; what it holds then is more than planned where an earlier one was not made."""
        known: tuple[int, float, EvictionSpec | None] | None = request.compresskv_next
        if known is None or not known[0] <= num_computed_tokens < known[1]:
            specs: tuple[EvictionSpec, ...] = request.compresskv_specs
            spec = next((spec for spec in specs if spec.num_read > num_computed_tokens), None)
            if spec is None and request.compresskv_decodes:
                spec = self._generated_cut(request, num_computed_tokens)
            known = (num_computed_tokens, math.inf if spec is None else spec.num_read, spec)
            request.compresskv_next = known
        spec, num_lost = known[2], self._manager.num_evicted.get(request.request_id, 0)
        if spec is None or spec.num_held == spec.num_read - num_lost:
            return spec
        return replace(spec, num_held=spec.num_read - num_lost)

    def _most_tokens(self, request: Any) -> int:
        """What a request holds at once until it has been read, what it had generated before included."""
        specs: tuple[EvictionSpec, ...] = request.compresskv_specs
        in_the_end: int = request.num_tokens - _num_lost(specs)
        if request.compresskv_decodes and self._settings.decode is not None:
            first, decode = self._generated_cut(request, 0), self._settings.decode
            in_the_end = min(in_the_end, max(first.num_held, decode.budget + decode.interval))
        return max(most_held(request.num_prompt_tokens, specs), in_the_end)

    def _may_end(self, spec: EvictionSpec) -> bool:
        """Whether what is noted of the prompt's tokens fits beside the step's other cuts; one always does."""
        others = sum(other.num_held for other in self._ending.values())
        return not others or others + spec.num_held <= self._max_observed

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Give back the blocks of prompts that this step reads up to a cut.

        The workers compact the cache in this very step, after its forward pass; new owners write in a later one.
        """
        super()._update_after_schedule(scheduler_output)
        scheduled = scheduler_output.num_scheduled_tokens
        scheduler_output.compresskv_evictions = planned = {}  # no fields of vLLM's, but they are sent with them
        scheduler_output.compresskv_watched = watched = {}
        for request_id, spec in self._nearing.items():
            if num_observed := self._num_observed(request_id, spec, scheduled):
                watched[request_id] = num_observed
        for request_id, spec in self._ending.items():
            if not scheduled.get(request_id):  # there was no room, or it was preempted
                continue
            request = self.requests[request_id]
            ends = request.num_computed_tokens == spec.num_read and scheduled[request_id] >= spec.last_chunk
            evicted = self._manager.evict(request_id, spec) if ends else None
            if evicted is None:
                self._manager.keep(request_id)
                self._keep_whole("its last step could not be cut")
                continue
            targets, num_freed = evicted
            planned[request_id] = PlannedEviction(spec, targets, self._num_observed(request_id, spec, scheduled))
            self._count(request, spec, num_freed)

    def _num_observed(self, request_id: str, spec: EvictionSpec, scheduled: Mapping[str, int]) -> int:
        """Tokens that this step reads of the observation window: its last ones."""
        num_scheduled = scheduled.get(request_id, 0)
        if not num_scheduled:
            return 0
        num_inside: int = self.requests[request_id].num_computed_tokens - (spec.num_read - spec.window_size)
        return max(0, min(num_scheduled, num_inside))

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

    def _count(self, request: Any, spec: EvictionSpec, num_freed: int) -> None:
        self._has_news = True
        counts = counters()
        if spec.generated:
            counts.add("cut_answers", 1)
        elif spec.num_read == request.num_prompt_tokens:
            counts.add("evicted_prompts", 1)
        counts.add("evicted_tokens", spec.num_candidates - spec.num_kept)
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
        logger.info("%s", eviction_line(counters().totals(), self._reasons))
        self._logged_at, self._has_news = now, False


class CompressedAsyncScheduler(CompressedScheduler, AsyncScheduler):
    """The same, where a step is planned before the one in front of it has come back.

    What a prompt keeps is known from its length and the settings alone, and the device works in one order: a block that
    is given back in a step has another owner in a later one.
    """


def _num_lost(specs: Sequence[EvictionSpec]) -> int:
    """Tokens that are gone when a prompt has been read."""
    return specs[-1].num_lost if specs else 0


def eviction_line(totals: dict[str, float], reasons: Counter[str]) -> str:
    """The line that the log has about what was evicted so far.

    Args:
        reasons: why prompts and answers were not cut as they should have been, and how many.
    """
    line = (
        "compresskv: {evicted_prompts:.0f} prompts cut, {evicted_tokens:.0f} tokens evicted, {freed_blocks:.0f} blocks "
        "freed, {scoring_seconds:.2f} s of scoring, {compaction_seconds:.2f} s of compaction so far"
    ).format(**totals)
    if totals["cut_answers"]:
        line += f"; {totals['cut_answers']:.0f} cuts of what was generated"
    if reasons:
        line += f"; {reasons.total()} not cut as asked ({', '.join(f'{reason}: {n}' for reason, n in reasons.items())})"
    if totals["unscored_prompts"]:
        line += f"; {totals['unscored_prompts']:.0f} prompts cut by position alone, for scoring failed"
    return line
