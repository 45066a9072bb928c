"""The worker on CPUs."""

from vllm.v1.worker.cpu_worker import CPUWorker

from compresskv.serving.room import scratch_nbytes


class CompressedCPUWorker(CPUWorker):
    """vLLM's CPU worker with our runner."""

    def init_device(self) -> None:
        """Make the runner, ours: `init_device` makes one of vLLM's class, whose name is ours meanwhile.

        vLLM's settings decide which of its two it is made from, and Triton is imported only for the second.
        """
        if self.use_v2_model_runner:
            from vllm.v1.worker.cpu import model_runner as place

            from compresskv.serving.runner_v2 import CompressedRunnerV2 as Ours
        else:
            from vllm.v1.worker import cpu_worker as place

            from compresskv.serving.runner_v1 import CompressedRunnerV1 as Ours
        theirs = place.CPUModelRunner
        place.CPUModelRunner = type("CompressedCPURunner", (Ours, theirs), {})
        try:
            super().init_device()
        finally:
            place.CPUModelRunner = theirs

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what is left, not as much as was asked for, is less what eviction takes.

        On CPUs vLLM looks at what the process holds, where scratch that was let go does not show.
        """
        available: int = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        return available - scratch_nbytes(self.model_config)
