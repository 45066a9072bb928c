"""The worker on GPUs."""

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from compresskv.serving.versions import check_hooks

check_hooks(Worker)


class CompressedGPUWorker(Worker):
    """vLLM's GPU worker with our runner."""

    def _make_model_runner(self) -> Any:
        """Ours; vLLM's settings decide which of its two it is made from, and Triton is imported only for the second."""
        if self.use_v2_model_runner:
            from compresskv.serving.runner_v2 import CompressedRunnerV2

            return CompressedRunnerV2(self.vllm_config, self.device)
        from compresskv.serving.runner_v1 import CompressedRunnerV1

        return CompressedRunnerV1(self.vllm_config, self.device)
