"""What is refused when vLLM starts, each with one line that says what to do."""

from collections.abc import Iterator
from typing import Any

import torch

from compresskv.errors import ServingError
from compresskv.serving.numbers import FP8, UNQUANTISED
from compresskv.serving.settings import Settings


def check_configuration(config: Any, settings: Settings) -> None:
    """Refuse a configuration that this was not proved with.

    Args:
        config: vLLM's VllmConfig, after the platform has made its changes.
    Raises:
        ServingError: the first thing refused, with its option.
    """
    for refused, line in _reasons(config, settings):
        if refused:
            raise ServingError(line)


def _reasons(config: Any, settings: Settings) -> Iterator[tuple[bool, str]]:
    yield from _of_features(config)
    yield from _of_parallelism(config.parallel_config)
    yield from _of_model(config.model_config)
    yield from _of_attention(config.model_config, config.parallel_config.tensor_parallel_size)
    yield from _of_steps(config, settings)


def _of_features(config: Any) -> Iterator[tuple[bool, str]]:
    cache, events = config.cache_config, config.kv_events_config
    yield config.speculative_config is not None, "speculative decoding is not supported: leave out --speculative-config"
    yield (
        config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
        "KV connectors and offloading are not supported",
    )
    yield config.ec_transfer_config is not None, "encoder cache connectors are not supported"
    yield events is not None and events.enable_kv_cache_events, "KV cache events are not supported"
    yield config.lora_config is not None, "LoRA is not supported: leave out --enable-lora"
    device, model = config.device_config.device_type, config.model_config
    yield from _of_cache_dtype(cache.cache_dtype, model.dtype, on_cpu=device == "cpu")
    yield (
        cache.cache_dtype in FP8 and bool(cache.kv_cache_dtype_skip_layers),
        f"--kv-cache-dtype-skip-layers {' '.join(cache.kv_cache_dtype_skip_layers)} is not supported: all layers must "
        "keep their caches alike",
    )
    yield cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill is not supported"


def check_cache_dtype(name: str, computed_in: torch.dtype, *, on_cpu: bool) -> None:
    """Refuse a KV cache of numbers that this was not proved with.

    Args:
        name: vLLM's, of the cache or of one layer's: what a checkpoint asks for is known only when it is loaded.
    Raises:
        ServingError: with the option.
    """
    for refused, line in _of_cache_dtype(name, computed_in, on_cpu=on_cpu):
        if refused:
            raise ServingError(f"compresskv inside vLLM: {line}")


def _of_cache_dtype(name: str, computed_in: torch.dtype, *, on_cpu: bool) -> Iterator[tuple[bool, str]]:
    yield (
        name not in UNQUANTISED and name not in FP8,
        f"--kv-cache-dtype {name} is not supported: of quantised KV caches only {', '.join(FP8)} are, on CPUs",
    )
    yield (
        name in FP8 and not on_cpu,
        f"--kv-cache-dtype {name} is supported on CPUs only: on GPUs compresskv was never run with it",
    )
    yield (
        name in FP8 and not has_fp8_caches(),
        f"--kv-cache-dtype {name} needs a processor with AVX-512 or AMX: vLLM has no such KV cache on others",
    )
    yield (
        name in FP8 and computed_in == torch.bfloat16 and uses_amx(),
        f"--kv-cache-dtype {name} was never run with AMX, which vLLM uses for bfloat16 on this processor: give --dtype "
        "float32 or float16, or leave it out",
    )


def has_fp8_caches() -> bool:
    """Whether vLLM's CPU build can keep its cache in fp8 on this processor: it looks at the same."""
    return bool(torch.cpu._is_avx512_supported() or uses_amx())


def uses_amx() -> bool:
    """Whether vLLM's CPU build attends with AMX in bfloat16, for which it keeps its cache in another layout."""
    return bool(torch.cpu._is_amx_tile_supported())


def _of_parallelism(parallel: Any) -> Iterator[tuple[bool, str]]:
    for option in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, option)
        yield size > 1, f"--{option.replace('_', '-')} {size} is not supported"
    yield (
        parallel.nnodes > 1 or parallel.distributed_executor_backend == "ray",
        "several machines (--nnodes, Ray) are not supported",
    )
    yield parallel.use_ubatching, "micro-batching (--enable-dbo, --ubatch-size) is not supported"


def _of_model(model: Any) -> Iterator[tuple[bool, str]]:
    name = model.model
    yield model.runner_type != "generate", f"{name} is run for {model.runner_type}: only text generation has a decode"
    yield model.is_encoder_decoder, f"{name} is an encoder-decoder model"
    yield model.is_multimodal_model, f"{name} is multimodal, which is not supported"
    yield model.use_mla, f"{name} uses multi-head latent attention, which is not supported"
    yield (
        model.is_hybrid or model.is_attention_free,
        f"{name} has layers without attention, which are not supported",
    )
    yield model.get_sliding_window() is not None, f"{name} has sliding-window layers, which are not supported"
    yield model.attention_chunk_size is not None, f"{name} attends in chunks of its context, which is not supported"


def _of_attention(model: Any, num_ranks: int) -> Iterator[tuple[bool, str]]:
    """As far as the model's configuration tells; the workers look at the layers themselves."""
    name, num_heads = model.model, model.get_total_num_kv_heads()
    yield model.uses_alibi, f"{name} uses ALiBi, which is not supported"
    yield (
        bool(getattr(model.hf_text_config, "num_kv_shared_layers", 0)),
        f"{name} has layers that share a KV cache, which are not supported",
    )
    yield (
        num_heads % num_ranks != 0,
        f"--tensor-parallel-size {num_ranks} does not divide the {num_heads} KV heads of {name}",
    )


def _of_steps(config: Any, settings: Settings) -> Iterator[tuple[bool, str]]:
    """The last chunk of a prompt holds the whole observation window, which must fit beside one token of every other."""
    scheduler, window = config.scheduler_config, max(2, settings.bare_method().window_size)
    tokens = min(
        scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    )
    yield (
        tokens < scheduler.max_num_seqs + window,
        f"--max-num-batched-tokens {tokens} must be at least --max-num-seqs {scheduler.max_num_seqs} plus the "
        f"observation window of {window}",
    )
    threshold = scheduler.long_prefill_token_threshold
    yield (
        0 < threshold < window,
        f"--long-prefill-token-threshold {threshold} is below the observation window of {window}",
    )
    mode = config.compilation_config.cudagraph_mode
    yield (
        mode is not None and mode.mixed_mode().name == "FULL",
        "full CUDA graphs for prefill hide the queries: set cudagraph_mode to FULL_AND_PIECEWISE or PIECEWISE",
    )
    yield (
        mode is not None and settings.decode is not None and mode.decode_mode().name == "FULL",
        "full CUDA graphs for decoding hide the queries that a decode budget needs: set cudagraph_mode to PIECEWISE",
    )
