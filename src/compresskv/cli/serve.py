"""`compresskv serve`: vLLM's OpenAI server, with each prompt's cache cut to a budget."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from compresskv.cli.options import BudgetOption, ProfileOption, SettingsOption, create_methods
from compresskv.cli.terminal import Bar, err
from compresskv.errors import ConfigError

EPILOG = """\b
Examples:
  compresskv serve
  compresskv serve org/name --budget 5% --port 8001
  compresskv serve ./my-model --budget 512 --set window_size=16 --max-model-len 32768

Options that are not listed here go to vLLM's server; MODEL comes before them. More: docs/serving.md
"""

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
_CPU_CACHE_NBYTES = 4 << 30
_MEMORY_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--kv-cache-memory")


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, or the embedded smollm2-135m.", metavar="[MODEL]")
    ] = "smollm2-135m",
    budget: BudgetOption = "256",
    method: Annotated[
        str, typer.Option(help="A method that keeps the same tokens in all layers: vote, streaming_llm.")
    ] = "vote",
    settings: SettingsOption = None,
    profile: ProfileOption = None,
) -> None:
    """Serve a model through vLLM's OpenAI API, with each request's prompt cache cut to a budget.

    A request may ask for another budget: "vllm_xargs": {"compresskv": 128}, "5%", or "off".
    """
    if model.startswith("-"):
        raise ConfigError(f"the model goes before options of vLLM: compresskv serve MODEL {model} ...")
    from compresskv.serving.versions import check_version, installed_version

    check_version(installed_version())
    environment = _environment(budget, method, settings, profile)
    with Bar() as bar:
        folder, name = _located(model, bar)
    # the server's own module: the 'vllm' command of the CPU build fails, for it asks for a package named 'vllm'
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += _defaults(context.args, name)
    err.print(f"starting vLLM with budget {budget}; a first start compiles the model and takes a minute or more")
    # vLLM takes this process over, so that Ctrl-C and every other signal reach it as if it had been started by hand
    os.execve(sys.executable, [*command, *context.args], os.environ | environment)


def _environment(budget: str, method: str, settings: list[str] | None, profile: Path | None) -> dict[str, str]:
    """The plugin's settings, checked.

    Raises:
        ConfigError, ProfileError: a value that cannot work.
    """
    from compresskv.serving.settings import find_settings

    if profile is not None:
        from compresskv.profiles.profile import read_profile

        read_profile(profile)
    (chosen,) = create_methods(method, "", settings)
    environment = {
        "COMPRESSKV_BUDGET": budget,
        "COMPRESSKV_METHOD": chosen.label,
        "COMPRESSKV_PROFILE": "" if profile is None else str(profile.absolute()),
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    find_settings({}, environment)
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "compresskv" not in plugins.split(","):
        environment["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, "compresskv")))
    return environment


def _located(model: str, bar: Bar) -> tuple[str, str]:
    """What vLLM is to load, and the name that requests give.

    Raises:
        ConfigError: a GGUF file.
        ModelError: the embedded model cannot be had.
    """
    from compresskv.embedded import EMBEDDED, ensure_embedded

    if model in EMBEDDED:
        return str(ensure_embedded(model, bar)), model
    if model.lower().endswith(".gguf"):
        raise ConfigError(f"model {model!r} is a GGUF file, which vLLM does not read: give a folder with safetensors")
    return model, model


def _defaults(given: Sequence[str], name: str) -> list[str]:
    """Options of vLLM that have to differ from its defaults, unless they are given."""
    from compresskv.serving.versions import is_cpu_build

    options = {argument.split("=")[0].replace("_", "-") for argument in given}
    defaults = [] if "--served-model-name" in options else ["--served-model-name", name]
    if is_cpu_build() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ and not options.intersection(_MEMORY_OPTIONS):
        defaults += ["--kv-cache-memory-bytes", str(_CPU_CACHE_NBYTES)]  # else vLLM asks for nearly all memory
    return defaults
