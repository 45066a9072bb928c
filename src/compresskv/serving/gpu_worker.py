"""The worker on GPUs."""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from compresskv.serving.runner import CompressedRunner


class CompressedGPURunner(CompressedRunner, GPUModelRunner):
    """vLLM's first GPU runner, for prompts that are cut."""


class CompressedGPUWorker(Worker):
    """vLLM's GPU worker with our runner."""

    def init_device(self) -> None:
        """Make the runner ours, as on CPUs."""
        super().init_device()
        self.model_runner.__class__ = CompressedGPURunner
