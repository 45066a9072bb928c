"""What is refused before an engine starts: one line that names the option."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from engine import engine_options
from vllm import EngineArgs
from vllm.platforms import current_platform

from compresskv.errors import ProfileError, ServingError
from compresskv.serving import versions
from compresskv.serving.profiles import check_profile_files
from compresskv.serving.settings import Settings


def configured(settings: dict[str, Any] | None, **options: Any) -> Any:
    """vLLM's configuration, which is where everything is refused."""
    return EngineArgs(**engine_options(settings, **options)).create_engine_config()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "connectors"),
        ({"kv_offloading_size": 1.0}, "offloading"),
        ({"kv_events_config": {"enable_kv_cache_events": True}}, "KV cache events"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype int8_per_token_head is not supported"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "--pipeline-parallel-size 2"),
        ({"nnodes": 3, "distributed_executor_backend": "mp", "tensor_parallel_size": 3}, "--nnodes"),
        ({"max_num_batched_tokens": 40, "max_num_seqs": 16}, "--max-num-batched-tokens 40 must be at least"),
        ({"long_prefill_token_threshold": 16}, "--long-prefill-token-threshold 16"),
        ({"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"}, "--scheduler-cls"),
        ({"worker_cls": "some.other.Worker"}, "some.other.Worker"),
        ({"hf_overrides": {"sliding_window": 1000, "architectures": ["MistralForCausalLM"]}}, "sliding-window"),
        ({"hf_overrides": {"attention_chunk_size": 512}}, "attends in chunks"),
        ({"hf_overrides": {"alibi": True}}, "uses ALiBi"),
        ({"hf_overrides": {"num_kv_shared_layers": 4}}, "layers that share a KV cache"),
        (
            {
                "hf_overrides": {"num_key_value_heads": 1},
                "tensor_parallel_size": 3,
                "distributed_executor_backend": "mp",
            },
            "--tensor-parallel-size 3 does not divide the 1 KV heads",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_configurations_that_were_not_proved(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ServingError, match=line) as refusal:  # which pydantic lets through as it is
        configured({"budget": 100}, **options)
    assert str(refusal.value).startswith("compresskv inside vLLM: ")
    assert "\n" not in str(refusal.value)
    if "hf_overrides" not in options and "some.other" not in str(options):
        configured(None, **options)  # it is ours to refuse, not vLLM's


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": [10, 20]}, "one block table"),
        ({"method": "vote"}, "no budget"),
        ({"budget": 100, "method": "snapkv"}, "'snapkv' keeps other tokens in every layer.*'streaming_llm', 'vote'"),
        ({"budget": 100, "method": "voet"}, "voet.*vote"),
        ({"budget": 100, "window_siez": 3}, "window_siez.*window_size"),
        ({"budget": 100, "lookahead": 4}, "lookahead=4"),
        ({"budget": 100, "profile": "/nowhere.json"}, "/nowhere.json"),
        (True, "compresskv=True"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings: Any, line: str) -> None:
    with pytest.raises(ServingError, match=line):
        configured(settings)


def test_another_vllm_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: "0.34.0")
    with pytest.raises(ServingError, match=r"vLLM 0\.34\.0 .* tested with vLLM 0\.31, 0\.32 and 0\.33"):
        configured({"budget": 100})
    configured(None)  # switched off, it does not care


def test_off_by_default_and_switched_on_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = configured(None)
    assert plain.scheduler_config.scheduler_cls is None
    assert plain.parallel_config.worker_cls.startswith("vllm.v1.worker.")
    monkeypatch.setitem(os.environ, "COMPRESSKV_BUDGET", "3%")
    monkeypatch.setitem(os.environ, "COMPRESSKV_METHOD", "vote[window_size=16]")
    ours = configured(None)
    assert ours.scheduler_config.scheduler_cls == "compresskv.serving.scheduler.CompressedScheduler"
    worker = "cpu_worker.CompressedCPUWorker" if current_platform.is_cpu() else "gpu_worker.CompressedGPUWorker"
    assert ours.parallel_config.worker_cls == f"compresskv.serving.{worker}"
    assert ours.additional_config["compresskv"] == Settings(0.03, "vote[window_size=16]").to_dict()
    assert configured(False).scheduler_config.scheduler_cls is None  # this engine's own word counts


def test_a_model_without_a_profile(tmp_path: Any) -> None:
    """Another model of the same shape: its weights tell."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = engine_options(None)["model"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    with pytest.raises(ServingError, match="no profile of this model"):
        configured({"budget": 100}, model=str(tmp_path))
    configured({"budget": 100, "method": "streaming_llm"}, model=str(tmp_path))
    # the same in the hub's cache: whole, then with a part that vLLM has yet to fetch, then not at all
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for file in tmp_path.glob("*.*"):
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "hub" / "models--org--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text("1")
    hub = SimpleNamespace(model="org/name", revision=None)
    with pytest.raises(ProfileError, match="no profile of this model"):
        check_profile_files(Settings(100), hub, str(tmp_path / "hub"))
    (snapshot / "model.safetensors").unlink()
    check_profile_files(Settings(100), hub, str(tmp_path / "hub"))
    check_profile_files(Settings(100), hub, str(tmp_path / "nowhere"))
    with pytest.raises(ProfileError, match="absent"):
        check_profile_files(Settings(100, profile=str(tmp_path / "absent.json")), hub, str(tmp_path / "nowhere"))


def test_a_refused_program_ends_with_one_line(clean_environment: dict[str, str]) -> None:
    """Where nobody catches it: no traceback, and nothing of pydantic's."""
    code = f"import vllm; vllm.LLM(**{engine_options({'budget': 100}, enable_lora=True)!r})"
    environment = clean_environment | {"VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "compresskv inside vLLM: LoRA is not supported: leave out --enable-lora"
    assert "Traceback" not in done.stderr
    assert "pydantic" not in done.stderr


@pytest.mark.slow
def test_a_server_that_is_refused_says_so_in_its_last_line(clean_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "compresskv", "serve", "smollm2-135m", "--max-num-batched-tokens", "40"]
    done = subprocess.run(command, env=clean_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("compresskv inside vLLM: --max-num-batched-tokens 40 must be")
    assert "Traceback" not in done.stderr
