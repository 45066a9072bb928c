"""The worker on CPUs."""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from compresskv.serving.room import scratch_nbytes
from compresskv.serving.runner import CompressedRunner


class CompressedCPURunner(CompressedRunner, CPUModelRunner):
    """vLLM's CPU runner, for prompts that are cut."""


class CompressedCPUWorker(CPUWorker):
    """vLLM's CPU worker with our runner."""

    def init_device(self) -> None:
        """Make the runner ours. `init_device` names the class itself, and a second runner would double its buffers."""
        super().init_device()
        self.model_runner.__class__ = CompressedCPURunner

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what is left, not as much as was asked for, is less what eviction takes.

        On CPUs vLLM looks at what the process holds, where scratch that was let go does not show.
        """
        available: int = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        return available - scratch_nbytes(self.model_config)
