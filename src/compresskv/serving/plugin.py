"""The entry point that vLLM calls in each of its processes. It does nothing until the settings switch it on."""

import functools
import logging
import sys
from typing import Any

from compresskv.serving.switch import KEY, given_settings

_MARK = "_compresskv_plugin"
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "compresskv.serving.cpu_worker.CompressedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "compresskv.serving.gpu_worker.CompressedGPUWorker",
}
_SCHEDULERS = {
    False: "compresskv.serving.scheduler.CompressedScheduler",
    True: "compresskv.serving.scheduler.CompressedAsyncScheduler",
}
"""By whether vLLM schedules asynchronously."""

_switched_on = False  # in this process, by whichever engine

logger = logging.getLogger("vllm.compresskv")  # below vLLM's own, so that it prints where vLLM prints


def register() -> None:
    """Let the platform's two checks, of a configuration and of a request, pass through ours. Safe to call again."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    if hasattr(platform, _MARK):
        return
    setattr(platform, _MARK, True)
    check_config = platform.check_and_update_config
    check_request = getattr(platform, "validate_request", None)  # a version without it is refused if it is switched on

    @functools.wraps(check_config)
    def check_and_update_config(_cls: Any, vllm_config: Any) -> None:
        check_config(vllm_config)
        configure(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)
    if check_request is None:
        return

    @functools.wraps(check_request)
    def validate_request(_cls: Any, processed_inputs: Any, params: Any) -> None:
        check_request(processed_inputs, params)
        if _switched_on:
            check_budget_of(params)

    platform.validate_request = classmethod(validate_request)


def configure(config: Any) -> None:
    """Switch on what the settings ask for, or leave vLLM as it is.

    Args:
        config: vLLM's VllmConfig, changed in place.
    Raises:
        ServingError: what cannot work, in one line. A program that does not catch it ends with that line alone.
    """
    if config.model_config is None or given_settings(config.additional_config) is None:
        return
    from compresskv.errors import CompressKVError, ServingError

    try:
        _configure(config)
    except CompressKVError as error:
        _end_with_one_line()
        raise ServingError(f"compresskv inside vLLM: {' '.join(str(error).splitlines())}") from None


def _configure(config: Any) -> None:
    from compresskv.serving.settings import find_settings

    settings = find_settings(config.additional_config)
    if settings is None:
        return
    from compresskv.serving import counters
    from compresskv.serving.profiles import check_profile_files
    from compresskv.serving.refusals import check_configuration
    from compresskv.serving.versions import check_version, installed_version

    check_version(installed_version(), on_cpu=config.device_config.device_type == "cpu")
    check_configuration(config, settings)
    check_profile_files(settings, config.model_config, config.load_config.download_dir)
    global _switched_on  # noqa: PLW0603 - requests are checked without the configuration at hand
    _switched_on = True
    _take_over(config)
    config.additional_config = {**(config.additional_config or {}), KEY: settings.to_dict()}
    counters.publish()


def _end_with_one_line() -> None:
    """Let a refusal that nobody catches end this process as it ends `compresskv`: one line, exit code 2."""
    from compresskv.errors import ServingError

    before = sys.excepthook
    if hasattr(before, _MARK):  # a program may catch a refusal and try again
        return

    def hook(kind: type[BaseException], error: BaseException, *trace: Any) -> None:
        if not issubclass(kind, ServingError):
            before(kind, error, *trace)
            return
        print(error, file=sys.stderr)  # noqa: T201
        raise SystemExit(2)

    setattr(hook, _MARK, True)
    sys.excepthook = hook


def check_budget_of(params: Any) -> None:
    """Refuse a request's bad budget where only the request fails, not the engine.

    Args:
        params: vLLM's SamplingParams or PoolingParams.
    Raises:
        VLLMValidationError: which the server answers with 400.
    """
    from vllm.exceptions import VLLMValidationError

    from compresskv.errors import ConfigError
    from compresskv.serving.settings import requested_budget

    try:
        requested_budget(getattr(params, "extra_args", None), 1)
    except ConfigError as error:
        raise VLLMValidationError(str(error)) from error


def _take_over(config: Any) -> None:
    """Name our scheduler and worker.

    Raises:
        ConfigError: others are named already.
    """
    from compresskv.errors import ConfigError

    parallel, scheduler = config.parallel_config, config.scheduler_config
    if parallel.worker_cls not in _WORKERS.values():
        if parallel.worker_cls not in _WORKERS:
            raise ConfigError(f"worker_cls={parallel.worker_cls!r} is not supported")
        parallel.worker_cls = _WORKERS[parallel.worker_cls]
        if config.device_config.device_type != "cpu":
            logger.warning("compresskv inside vLLM was tested on CPUs only: see docs/serving.md")
    if scheduler.scheduler_cls not in (None, *_SCHEDULERS.values()):
        raise ConfigError(f"--scheduler-cls {scheduler.scheduler_cls} is not supported")
    scheduler.scheduler_cls = _SCHEDULERS[bool(scheduler.async_scheduling)]
