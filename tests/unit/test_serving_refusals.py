"""Configurations of vLLM that are refused, by stand-ins for them.

They have the names that `check_supported` reads. That vLLM's own have them is shown in tests/serving, where real
configurations pass through all of it.
"""

import copy
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compresskv.errors import ServingError
from compresskv.serving.plugin import _end_with_one_line
from compresskv.serving.refusals import check_cache_dtype, check_configuration
from compresskv.serving.settings import Settings

PARALLEL = SimpleNamespace(
    pipeline_parallel_size=1,
    decode_context_parallel_size=1,
    prefill_context_parallel_size=1,
    tensor_parallel_size=2,
    nnodes=1,
    distributed_executor_backend="mp",
    use_ubatching=False,
)
MODEL = SimpleNamespace(
    model="org/name",
    dtype=torch.bfloat16,
    runner_type="generate",
    is_encoder_decoder=False,
    is_multimodal_model=False,
    use_mla=False,
    is_hybrid=False,
    is_attention_free=False,
    get_sliding_window=lambda: None,
    attention_chunk_size=None,
    get_total_num_kv_heads=lambda: 4,
    uses_alibi=False,
    hf_text_config=SimpleNamespace(),
)
SCHEDULER = SimpleNamespace(
    max_num_batched_tokens=2048, max_num_scheduled_tokens=None, max_num_seqs=64, long_prefill_token_threshold=0
)
CONFIG = SimpleNamespace(
    cache_config=SimpleNamespace(
        kv_offloading_size=None, cache_dtype="auto", kv_cache_dtype_skip_layers=[], kv_sharing_fast_prefill=False
    ),
    device_config=SimpleNamespace(device_type="cuda"),
    kv_events_config=SimpleNamespace(enable_kv_cache_events=False),
    speculative_config=None,
    kv_transfer_config=None,
    ec_transfer_config=None,
    lora_config=None,
    parallel_config=PARALLEL,
    model_config=MODEL,
    scheduler_config=SCHEDULER,
    compilation_config=SimpleNamespace(cudagraph_mode=None),
)


def graphs(name: str) -> Any:
    """In the place of vLLM's CUDAGraphMode, which says what it means for steps that read prompts."""
    return SimpleNamespace(mixed_mode=lambda: SimpleNamespace(name=name))


@pytest.mark.parametrize("mode", [None, graphs("PIECEWISE"), graphs("NONE")], ids=["none", "piecewise", "off"])
def test_what_was_proved_passes(mode: Any) -> None:
    config = copy.deepcopy(CONFIG)
    config.compilation_config.cudagraph_mode = mode
    check_configuration(config, Settings(100))
    config.kv_events_config = None
    check_configuration(config, Settings(100))


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        ("speculative_config", object(), "--speculative-config"),
        ("kv_transfer_config", object(), "KV connectors and offloading"),
        ("cache_config.kv_offloading_size", 1.0, "KV connectors and offloading"),
        ("ec_transfer_config", object(), "encoder cache connectors"),
        ("kv_events_config.enable_kv_cache_events", True, "KV cache events"),
        ("lora_config", object(), "--enable-lora"),
        ("cache_config.cache_dtype", "fp8", "--kv-cache-dtype fp8 is supported on CPUs only"),
        ("cache_config.cache_dtype", "int8_per_token_head", "--kv-cache-dtype int8_per_token_head is not supported"),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size 2"),
        ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size 2"),
        ("parallel_config.prefill_context_parallel_size", 2, "--prefill-context-parallel-size 2"),
        ("parallel_config.nnodes", 2, "--nnodes"),
        ("parallel_config.distributed_executor_backend", "ray", "Ray"),
        ("parallel_config.use_ubatching", True, "--enable-dbo"),
        ("parallel_config.tensor_parallel_size", 3, "--tensor-parallel-size 3 does not divide the 4 KV heads"),
        ("model_config.runner_type", "pooling", "org/name is run for pooling"),
        ("model_config.is_encoder_decoder", True, "org/name is an encoder-decoder"),
        ("model_config.is_multimodal_model", True, "org/name is multimodal"),
        ("model_config.use_mla", True, "multi-head latent attention"),
        ("model_config.is_hybrid", True, "layers without attention"),
        ("model_config.is_attention_free", True, "layers without attention"),
        ("model_config.get_sliding_window", lambda: 4096, "sliding-window"),
        ("model_config.attention_chunk_size", 8192, "org/name attends in chunks"),
        ("model_config.uses_alibi", True, "ALiBi"),
        ("model_config.hf_text_config.num_kv_shared_layers", 4, "share a KV cache"),
        ("scheduler_config.max_num_batched_tokens", 95, "--max-num-batched-tokens 95 must be at least"),
        ("scheduler_config.max_num_scheduled_tokens", 95, "--max-num-batched-tokens 95 must be at least"),
        ("scheduler_config.long_prefill_token_threshold", 31, "--long-prefill-token-threshold 31"),
        ("compilation_config.cudagraph_mode", graphs("FULL"), "FULL_AND_PIECEWISE or PIECEWISE"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_was_not_is_refused(place: str, value: Any, line: str) -> None:
    config = copy.deepcopy(CONFIG)
    target: Any = config
    *path, name = place.split(".")
    for part in path:
        target = getattr(target, part)
    setattr(target, name, value)
    with pytest.raises(ServingError, match=re.escape(line)) as refusal:
        check_configuration(config, Settings(100))
    assert "\n" not in str(refusal.value)


def test_a_refused_program_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """However often it has tried."""
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_rest: others.append(kind))
    _end_with_one_line()
    hook = sys.excepthook
    _end_with_one_line()
    assert sys.excepthook is hook
    with pytest.raises(SystemExit) as end:
        sys.excepthook(ServingError, ServingError("refused"), None)
    assert end.value.code == 2
    assert capsys.readouterr().err == "refused\n"
    sys.excepthook(KeyError, KeyError("a"), None)
    assert others == [KeyError]


def test_graphs_of_whole_decode_steps_hide_what_a_decode_budget_needs() -> None:
    config = copy.deepcopy(CONFIG)
    config.compilation_config.cudagraph_mode = SimpleNamespace(
        mixed_mode=lambda: SimpleNamespace(name="PIECEWISE"), decode_mode=lambda: SimpleNamespace(name="FULL")
    )
    check_configuration(config, Settings(100))
    with pytest.raises(ServingError, match="decode budget needs: set cudagraph_mode to PIECEWISE"):
        check_configuration(config, Settings(100, decode_budget=200))


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_caches_in_fp8_are_for_cpus_that_have_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(CONFIG)
    config.cache_config.cache_dtype, config.device_config.device_type = name, "cpu"
    processor = {"has_fp8_caches": True, "uses_amx": False}

    def check(message: str | None = None) -> None:
        for function, has in processor.items():
            monkeypatch.setattr(f"compresskv.serving.refusals.{function}", lambda has=has: has)
        refused = pytest.raises(ServingError, match=message)
        with refused if message else nullcontext():
            check_configuration(config, Settings(100))
        with refused if message else nullcontext():
            check_cache_dtype(name, config.model_config.dtype, on_cpu=True)

    check()
    processor["uses_amx"] = True
    check(f"--kv-cache-dtype {name} was never run with AMX")
    config.model_config.dtype = torch.float32
    check()
    processor["has_fp8_caches"] = False
    check(f"--kv-cache-dtype {name} needs a processor with AVX-512 or AMX")


def test_layers_that_keep_their_caches_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(CONFIG)
    config.cache_config.kv_cache_dtype_skip_layers = ["0", "3"]
    check_configuration(config, Settings(100))  # they are all alike
    config.cache_config.cache_dtype, config.device_config.device_type = "fp8", "cpu"
    for function, has in {"has_fp8_caches": True, "uses_amx": False}.items():
        monkeypatch.setattr(f"compresskv.serving.refusals.{function}", lambda has=has: has)
    with pytest.raises(ServingError, match="--kv-cache-dtype-skip-layers 0 3 is not supported"):
        check_configuration(config, Settings(100))
