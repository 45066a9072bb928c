"""The scheduler's part: chunks that end with the prompt, and blocks given back when it has been read."""

import logging
import math
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from compresskv.errors import ServingError
from compresskv.serving.blocks import CompressedAttentionManager
from compresskv.serving.counters import counters
from compresskv.serving.settings import KEY, Cut, find_settings
from compresskv.serving.versions import check_signature

_LOG_INTERVAL_S = 10.0

logger = logging.getLogger("vllm.compresskv")

check_signature(Scheduler._reserve_prefill_lookahead, "self", "request", "num_computed_tokens", "num_new_tokens")
check_signature(Scheduler._get_local_prefix_cache_hit, "self", "request")
check_signature(Scheduler._update_after_schedule, "self", "scheduler_output")
check_signature(Scheduler.add_request, "self", "request")
check_signature(Scheduler.update_from_output, "self", "scheduler_output", "model_runner_output")
check_signature(Scheduler.shutdown, "self")


class CompressedScheduler(Scheduler):
    """vLLM's scheduler for prompts that are cut at the end of prefill."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = find_settings(self.vllm_config.additional_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if settings is None or len(managers) != 1 or not isinstance(managers[0], CompressedAttentionManager):
            kinds = ", ".join(type(manager).__name__ for manager in managers)
            raise ServingError(f"compresskv inside vLLM: KV cache groups ({kinds}) are not one of full attention")
        self._settings = settings
        self._manager = managers[0]
        self._logged_at = -math.inf  # the first cut is told at once
        self._num_unlogged = 0
        counters()  # makes their file now, while its folder is surely there

    def add_request(self, request: Any) -> None:
        """Queue a request. The prompt of a streaming session grows later, so nothing is evicted of it."""
        if request.resumable or request.request_id in self.requests:
            extra_args = request.sampling_params.extra_args or {}
            request.sampling_params.extra_args = {**extra_args, KEY: False}
        super().add_request(request)

    def _cut(self, request: Any) -> Cut | None:
        num_prompt, extra_args = request.num_prompt_tokens, request.sampling_params.extra_args
        if not self.cache_config.enable_prefix_caching:
            return self._settings.requested_cut(num_prompt, extra_args)
        return self._settings.cut_in_pool(num_prompt, extra_args, self.block_size, self.kv_cache_config.num_blocks - 1)

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        """Cached blocks of the prompt, without those of the observation window: its queries have to be computed."""
        blocks, num_local, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        cut = self._cut(request)
        if cut is not None and num_local > cut.num_prompt - cut.window_size:
            num_local = (cut.num_prompt - cut.window_size) // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_local)
        return blocks, num_local, boundary, diverged

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """No chunk goes beyond the prompt's end, and the chunk that reaches it holds the whole observation window.

        Returns: tokens to read in this step; 0 where the window does not fit any more, so that the request waits.
        """
        num_new: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        num_left: int = request.num_prompt_tokens - num_computed_tokens
        if num_left <= 0 or (cut := self._cut(request)) is None:
            return num_new
        ends = num_new >= num_left
        self._manager.prepare(request.request_id, cut if ends else None)
        return num_left if ends else max(0, min(num_new, num_left - cut.window_size))

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Give back the blocks of prompts that this step reads to their end.

        The workers compact the cache in this very step, after its forward pass; new owners write in a later one.
        """
        super()._update_after_schedule(scheduler_output)
        scheduler_output.compresskv_blocks = targets = {}  # no field of vLLM's, but it is sent with them
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if request.num_computed_tokens == request.num_prompt_tokens and (cut := self._cut(request)) is not None:
                targets[request_id], num_freed = self._manager.evict(request_id, cut)
                self._count(cut, num_freed)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """After a step, in which the workers have cut what it read to the end."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._log(may_wait=self.has_unfinished_requests())
        return outputs

    def shutdown(self) -> None:
        """Tell of the last cuts, if requests were still running."""
        self._log(may_wait=False)
        super().shutdown()

    def _count(self, cut: Cut, num_freed: int) -> None:
        self._num_unlogged += 1
        counts = counters()
        counts.add("evicted_prompts", 1)
        counts.add("evicted_tokens", cut.num_evicted)
        counts.add("freed_blocks", num_freed)

    def _log(self, *, may_wait: bool) -> None:
        """One line, if there is news: now and then while requests run (`may_wait`), and when none is left."""
        now = time.monotonic()
        if not self._num_unlogged or (may_wait and now - self._logged_at < _LOG_INTERVAL_S):
            return
        logger.info(
            "compresskv: %(evicted_prompts)d prompts cut, %(evicted_tokens)d tokens evicted, %(freed_blocks)d blocks "
            "freed, %(scoring_seconds).2f s of scoring, %(compaction_seconds).2f s of compaction so far",
            counters().totals(),
        )
        self._logged_at, self._num_unlogged = now, 0
