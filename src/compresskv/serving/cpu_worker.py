"""The worker on CPUs."""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from compresskv.serving.runner import CompressedRunner


class CompressedCPURunner(CompressedRunner, CPUModelRunner):
    """vLLM's CPU runner, for prompts that are cut."""


class CompressedCPUWorker(CPUWorker):
    """vLLM's CPU worker with our runner."""

    def init_device(self) -> None:
        """Make the runner ours. `init_device` names the class itself, and a second runner would double its buffers."""
        super().init_device()
        self.model_runner.__class__ = CompressedCPURunner
