"""`compresskv serve`: vLLM's OpenAI server, with each prompt's cache cut to a budget."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli.options import (
    ChunkBudgetOption,
    DecodeBudgetOption,
    ProfileOption,
    SettingsOption,
    budget_help,
    create_method,
)
from compresskv.cli.terminal import Bar, err
from compresskv.errors import ConfigError
from compresskv.selection.budget_words import IN_TOKENS, in_words
from compresskv.selection.cuts import CHUNK_TOKENS, DECODE_INTERVAL
from compresskv.system.inputs import read_bytes

EPILOG = """\b
Examples:
  compresskv serve
  compresskv serve org/name --budget 5% --port 8001
  compresskv serve ./my-model --budget 512 --set window_size=16 \\
      --max-model-len 32768
  compresskv serve org/name --max-model-len 131072 --chunk-budget 4096

Options that are not listed here go to vLLM's server; MODEL comes before them. More: docs/serving.md
"""

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
_CPU_CACHE_NBYTES = 4 << 30
_OWN_OPTIONS = {"budget": "--budget", "method": "--method", "settings": "--set", "profile": "--profile"} | {
    name: f"--{name.replace('_', '-')}"
    for name in ("chunk_budget", "chunk_tokens", "decode_budget", "decode_interval", "decode_method")
}
_ADDITIONAL = "--additional-config"
_DTYPE = "--dtype"
_UNSERVED = ("--store", "--of", "--chunk", "--max-memory", "--prefill-memory", "--compare", "--exact-prefill")
_MEMORY_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--kv-cache-memory")


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"Hub id, folder, or the embedded {defaults.MODEL}.")] = defaults.MODEL,
    budget: Annotated[
        str,
        typer.Option(help=f"{budget_help(*IN_TOKENS)}.", metavar="BUDGET"),
    ] = str(defaults.BUDGET),
    method: Annotated[
        str,
        typer.Option(help="A method that keeps the same tokens in all layers: vote, streaming_llm.", metavar="METHOD"),
    ] = defaults.SERVED_METHOD,
    settings: SettingsOption = None,
    profile: ProfileOption = None,
    chunk_budget: ChunkBudgetOption = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help=f"Tokens of a chunk ({CHUNK_TOKENS}).", metavar="TOKENS")
    ] = None,
    decode_budget: DecodeBudgetOption = None,
    decode_interval: Annotated[
        int | None, typer.Option(help=f"New tokens between two such cuts ({DECODE_INTERVAL}).", metavar="TOKENS")
    ] = None,
    decode_method: Annotated[
        str | None,
        typer.Option(
            help=f"The method of these cuts ({defaults.SERVED_DECODE_METHOD}); one that keeps the same tokens in all "
            "layers.",
            metavar="METHOD",
        ),
    ] = None,
) -> None:
    """Serve a model through vLLM's OpenAI API, with each request's prompt cache cut to a budget.

    What is not given is taken from COMPRESSKV_BUDGET, COMPRESSKV_METHOD, COMPRESSKV_CHUNK_BUDGET and so on where they
    are exported.
    A request may ask for another budget: "vllm_xargs": {"compresskv": 128}, "5%", or "off".
    """
    if model.startswith("-"):
        raise ConfigError(f"the model goes before options of vLLM: compresskv serve MODEL {model} ...")
    _check_served(context.args)
    from compresskv.serving.settings import plugins_with_ours
    from compresskv.serving.versions import check_version, installed_version

    check_version(installed_version())
    given = [option for name, option in _OWN_OPTIONS.items() if _is_given(context, name)]
    environment = plugins_with_ours()
    if (place := _place_of_settings(context.args)) is not None:
        if given:
            raise ConfigError(f"{place} holds settings of compresskv already: leave out {', '.join(given)}")
        told = f"with the settings in {place}"
    else:
        budget = budget if "--budget" in given else os.environ.get("COMPRESSKV_BUDGET") or budget
        if "--method" not in given:
            method = _exported_method(method, settings)
        if profile is None and os.environ.get("COMPRESSKV_PROFILE"):
            profile = Path(os.environ["COMPRESSKV_PROFILE"])
        cuts: dict[str, int | str | None] = {
            "chunk_budget": chunk_budget,
            "chunk_tokens": chunk_tokens,
            "decode_budget": decode_budget,
            "decode_interval": decode_interval,
            "decode_method": decode_method,
        }
        own = _settings_environment(budget, method, settings, profile, cuts)
        environment |= own
        told = _what_happens(own)
    with Bar() as bar:
        folder, name = _located(model, bar)
    # the server's own module: the 'vllm' command of the CPU build fails, for it asks for a package named 'vllm'
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += _defaults(context.args, name)
    err.print(f"starting vLLM {told}; a first start compiles the model and takes a minute or more")
    # vLLM takes this process over, so that Ctrl-C and every other signal reach it as if it had been started by hand
    os.execve(sys.executable, [*command, *context.args], os.environ | environment)


def _check_served(arguments: Sequence[str]) -> None:
    """Refuse options of other commands, which vLLM does not know.

    Raises:
        ConfigError: naming the first.
    """
    for argument in arguments:
        if (option := argument.partition("=")[0].replace("_", "-")) in _UNSERVED:
            raise ConfigError(f"{option} is of commands that load a model themselves: leave it out to serve")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _place_of_settings(arguments: Sequence[str]) -> str | None:
    """The option for vLLM that holds settings of ours: --additional-config, or --config with a file that has it.

    As in vLLM, the file's is read only where the command line has none.
    """
    additional: list[tuple[str, Any]] = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if _is_additional(option):
            additional.append((option, value if equals else following))
    file = _file_of_options(arguments)
    if additional:
        return _ADDITIONAL if _hold_settings(additional) else None
    return f"--config {file}" if file and _hold_settings(_options_in(file)) else None


def _is_additional(option: str) -> bool:
    return option.replace("_", "-").partition(".")[0] == _ADDITIONAL


def _hold_settings(options: Iterable[tuple[str, Any]]) -> bool:
    """Whether --additional-config JSON or --additional-config.compresskv... is among them. null are no settings."""
    for option, value in options:
        if not _is_additional(option):
            continue
        if (inner := option.partition(".")[2]) and inner.partition(".")[0] == "compresskv":
            return True
        try:
            content = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            continue  # vLLM says what is wrong with it
        if not inner and isinstance(content, dict) and content.get("compresskv") is not None:
            return True
    return False


def _options_in(file: str) -> list[tuple[str, Any]]:
    """The options in vLLM's file of them; none where it cannot be read, which vLLM says."""
    import yaml

    try:
        content = yaml.safe_load(read_bytes(file))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [(f"--{name}", value) for name, value in content.items()] if isinstance(content, dict) else []


def _exported_method(default: str, settings: list[str] | None) -> str:
    """COMPRESSKV_METHOD, or the default.

    Raises:
        ConfigError: it has options, and so has --set.
    """
    exported = os.environ.get("COMPRESSKV_METHOD") or default
    if settings and "[" in exported:
        raise ConfigError(f"COMPRESSKV_METHOD={exported!r} has options already: give --method beside --set")
    return exported


def _settings_environment(
    budget: str, method: str, settings: list[str] | None, profile: Path | None, cuts: Mapping[str, int | str | None]
) -> dict[str, str]:
    """The plugin's settings, checked.

    Args:
        cuts: other settings; what is None is taken from the environment.
    Raises:
        ConfigError, ProfileError: a value that cannot work.
    """
    from compresskv.serving.settings import find_settings
    from compresskv.serving.switch import VARIABLES

    if profile is not None:
        from compresskv.profiles.profile import read_profile

        read_profile(profile)
    chosen = create_method(method, settings)
    environment = {
        "COMPRESSKV_BUDGET": budget,
        "COMPRESSKV_METHOD": chosen.label,
        "COMPRESSKV_PROFILE": "" if profile is None else str(profile.absolute()),
    }
    for name, value in cuts.items():
        variable = VARIABLES[name]
        environment[variable] = os.environ.get(variable, "") if value is None else str(value)
    find_settings({}, environment)
    return environment


def _what_happens(environment: dict[str, str]) -> str:
    """What these settings do to a request, for the line that is printed."""
    from compresskv.serving.settings import find_settings

    chosen = find_settings({}, environment)
    assert chosen is not None  # they hold a budget
    if isinstance(chosen.budget, int):
        kept = in_words(chosen.budget)
    else:
        kept = "" if chosen.budget == 1 else f"{100 * chosen.budget:.3g}% of its tokens"
    answers = ""
    if chosen.decode is not None:
        answers = f"; after each {chosen.decode.interval} tokens of an answer, all is cut to {chosen.decode.budget}"
    if not kept:
        return f"with prompts kept whole, except where a request gives a budget of its own{answers}"
    if chosen.chunks is not None:
        kept += f" (and to {chosen.chunks.budget} after each {chosen.chunks.tokens} while it is read)"
    return (
        f"with each prompt cut to {kept} once it has been read, and its other blocks freed{answers}; prompts within "
        "the budget, or of requests that say 'off', are kept whole, and others for reasons that the log and the "
        "metrics tell"
    )


def _located(model: str, bar: Bar) -> tuple[str, str]:
    """What vLLM is to load, and the name that requests give.

    Raises:
        ConfigError: a GGUF file.
        ModelError: the embedded model cannot be had.
    """
    from compresskv.models.embedded import EMBEDDED, ensure_embedded

    if model in EMBEDDED:
        return str(ensure_embedded(model, bar)), model
    if model.lower().endswith(".gguf"):
        raise ConfigError(f"model {model!r} is a GGUF file, which vLLM does not read: give a folder with safetensors")
    return model, model


def _defaults(given: Sequence[str], name: str) -> list[str]:
    """Options of vLLM that have to differ from its defaults, unless they are given, there or in its file of them."""
    from compresskv.serving.versions import is_cpu_build

    options = {argument.split("=")[0].replace("_", "-") for argument in given}
    if (file := _file_of_options(given)) is not None:
        options.update(option.replace("_", "-") for option, _ in _options_in(file))
    defaults = [] if "--served-model-name" in options else ["--served-model-name", name]
    if not is_cpu_build():
        return defaults
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and not options.intersection(_MEMORY_OPTIONS):
        defaults += ["--kv-cache-memory-bytes", str(_CPU_CACHE_NBYTES)]  # else vLLM asks for nearly all memory
    if _DTYPE not in options and not _computes_bfloat16():
        err.print("computing in float32, since this processor has no instructions for bfloat16; --dtype decides")
        defaults += [_DTYPE, "float32"]  # else vLLM computes as the checkpoint is stored, and takes many times as long
    return defaults


def _file_of_options(arguments: Sequence[str]) -> str | None:
    """vLLM's file of options, where it is told of one."""
    given = [following for option, following in pairwise(arguments) if option == "--config"]
    return given[-1] if given else None


def _computes_bfloat16() -> bool:
    import torch

    from compresskv.models.dtype import multiplies

    return multiplies(torch.bfloat16, torch.device("cpu"))
