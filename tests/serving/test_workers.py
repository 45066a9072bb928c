"""The runner that a worker makes is ours, from the one of vLLM's two that vLLM chose."""

import importlib

import pytest
from engine import Engine
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker.gpu_worker import Worker

from compresskv.serving.runner import CompressedRunner


def test_on_cpus(small: Engine) -> None:
    ours, vllms = type(small.runner), small.vllms_runner_class
    assert issubclass(ours, CompressedRunner)
    assert vllms.__module__ == f"vllm.v1.worker.gpu{'.' if small.is_v2 else '_'}model_runner"
    assert [kind.__name__ for kind in ours.__mro__ if kind.__name__ == "CPUModelRunner"]


@pytest.mark.parametrize("number", [1, 2])
def test_on_gpus(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be said without one."""
    if not hasattr(Worker, "_make_model_runner"):
        pytest.skip("on GPUs this vLLM is refused")
    if number == 2 and not HAS_TRITON:
        pytest.skip("vLLM's second runner needs Triton")
    from compresskv.serving.gpu_worker import CompressedGPUWorker

    module = importlib.import_module(f"compresskv.serving.runner_v{number}")
    monkeypatch.setattr(module, f"CompressedRunnerV{number}", lambda *given: given)
    worker = object.__new__(CompressedGPUWorker)
    worker.use_v2_model_runner = number == 2
    worker.vllm_config, worker.device = "the configuration", "cuda"
    assert worker._make_model_runner() == ("the configuration", "cuda")
