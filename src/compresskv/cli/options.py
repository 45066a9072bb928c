"""Options that several commands take, and how their text becomes values."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from compresskv import defaults
from compresskv.errors import ConfigError
from compresskv.methods.options import parse_settings
from compresskv.selection.auto_budget import MAX_LOSS
from compresskv.selection.budget_words import BEFOREHAND, any_of
from compresskv.selection.precision import PRECISIONS
from compresskv.selection.sizes import find_nbytes

if TYPE_CHECKING:
    from compresskv.methods.base import Method

N = TypeVar("N", int, float)


def budget_help(*kinds: str) -> str:
    """What a budget may be, in the words of every command."""
    return f"What is kept of a prompt, per layer and KV head: {any_of(*kinds)}"


_MODEL_HELP = f"Hub id, folder, .gguf file, or the embedded {defaults.MODEL}."
ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP, metavar="MODEL")]
MethodOption = Annotated[
    str, typer.Option(help="See 'compresskv methods'; with options: snapkv[window_size=32].", metavar="METHOD")
]
SessionMethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="See 'compresskv methods'. Default: forecast, or kvzip, which takes longer, where the model has no "
        "profile for it.",
        metavar="METHOD",
    ),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        help=f"{budget_help(*BEFOREHAND)}.",
        metavar="BUDGET",
    ),
]
AutoBudgetOption = Annotated[
    str,
    typer.Option(
        help=f"{budget_help(*BEFOREHAND, 'auto, as much of each prompt as --max-loss asks for')}.",
        metavar="BUDGET",
    ),
]
MaxLossOption = Annotated[
    float | None,
    typer.Option(
        help=f"With --budget auto: the predicted loss that is allowed, in nats per token. Default: {MAX_LOSS:g}.",
        metavar="LOSS",
    ),
]
MaxBudgetOption = Annotated[
    str | None,
    typer.Option(
        help="With --budget auto: what is kept at most, whatever is lost; any budget but auto.", metavar="BUDGET"
    ),
]
OfOption = Annotated[
    str,
    typer.Option(
        "--of", help="What a share is of: the prompt's 'tokens', or the full cache's 'bytes'.", metavar="UNIT"
    ),
]
StoreOption = Annotated[
    str,
    typer.Option(
        help=f"In how many bits a number what is kept is held: {', '.join(PRECISIONS)} (docs/stores.md).",
        metavar="STORE",
    ),
]
TruncateOption = Annotated[
    str,
    typer.Option(help="'never' refuses a document above the model's context, 'middle' cuts its middle.", metavar="WAY"),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of --method, such as window_size=32.", metavar="NAME=VALUE"),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, or int8 (8-bit weights). Default: the checkpoint's own, or float32 on a CPU "
        "that has no instructions for it.",
        metavar="DTYPE",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.", metavar="DEVICE")
]
CompileOption = Annotated[
    str,
    typer.Option(
        "--compile",
        help="'always' decodes by a compiled step, built if need be (a minute); 'auto' uses one that was built before, "
        "if the answer is long enough to pay for loading it; 'never' does not.",
        metavar="WAY",
    ),
]
PrefillMemoryOption = Annotated[
    str,
    typer.Option(
        help="About what a layer's activations may need while the prompt is read, such as 500MB or 2GB: layers then "
        "take it in pieces. 'auto': pieces of 4,096 tokens; 'whole': all at once.",
        metavar="SIZE",
    ),
]
CandidatesOption = Annotated[
    str,
    typer.Option(
        help="Methods that decide when all layers were read hold, until then, so many times their budget of each; "
        "'all': the whole prompt, for the exact choice.",
        metavar="NUMBER",
    ),
]
ChunkBudgetOption = Annotated[
    int | None,
    typer.Option(
        help="Cut prompts while they are read, too: as many tokens stay from chunk to chunk, no fewer than --budget.",
        metavar="TOKENS",
    ),
]
ChunkTokensOption = Annotated[int, typer.Option(help="Tokens between two cuts of --chunk-budget.", metavar="TOKENS")]
DecodeBudgetOption = Annotated[
    int | None,
    typer.Option(
        help="Cut what is generated, too: as many tokens stay, the prompt's among them, whenever --decode-interval new "
        "ones came.",
        metavar="TOKENS",
    ),
]
DecodeIntervalOption = Annotated[int, typer.Option(help="New tokens between two such cuts.", metavar="TOKENS")]
DecodeMethodOption = Annotated[
    str | None,
    typer.Option(
        help="The method of these cuts; with options: rkv[window_size=16]. Default: "
        f"{defaults.DECODE_METHODS[0]}, or {defaults.DECODE_METHODS[1]} where the profile lacks what that needs.",
        metavar="METHOD",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="Profile file. Default: the model's own.", metavar="FILE")
]

OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", help="The file to write. Default: in the user's cache.", metavar="FILE")
]


def check_profile(profile: Path | None) -> None:
    """Refuse a profile that cannot be read, before a model is loaded.

    Raises:
        ProfileError: no such file, or no profile.
    """
    if profile is not None:
        from compresskv.profiles.profile import read_profile

        read_profile(profile)


def create_method(method: str, settings: list[str] | None) -> "Method":
    """The one method of a command that takes no others.

    Raises:
        ConfigError: as `create_methods`.
    """
    return create_methods(method, None, settings)[0]


def create_methods(method: str, compare: str | None, settings: list[str] | None) -> "list[Method]":
    """The method with its settings, then those to compare it with, each once.

    Args:
        compare: None: the command cannot compare.
    Raises:
        ConfigError: an unknown method, or a setting that does not fit.
    """
    from compresskv.methods import registry

    options = parse_settings("settings", settings or [])
    if "[" in method or "," in method:
        if options:
            raise ConfigError("has options already: leave out --set", option="method", value=method)
        chosen = registry.parse_methods("method", method)
        if len(chosen) > 1:
            others = "" if compare is None else f", and the others as compare={','.join(list(chosen)[1:])}"
            raise ConfigError(f"names {len(chosen)} methods: give one{others}", option="method", value=method)
    else:
        try:
            one = registry.create(method, **options)
        except ConfigError as error:
            if error.option not in options:
                raise
            setting = f"{error.option}={options[error.option]}"
            raise ConfigError(error.problem, option="settings", value=setting) from None
        chosen = {one.label: one}
    compared = registry.parse_methods("compare", compare) if compare and compare.strip() else {}
    return list((chosen | {label: one for label, one in compared.items() if label not in chosen}).values())


def check_timed(option: str, method: "Method") -> None:
    """Refuse methods whose decode steps cannot be timed alone.

    Raises:
        ConfigError: naming the option and the method.
    """
    problem = None
    if method.lookahead:
        problem = "looks ahead: its cost falls into decoding and is not measured"
    elif method.replays:
        problem = "reads the prompt twice, which is not measured here: name another"
    if problem is not None:
        raise ConfigError(problem, option=option, value=method.label)


def parse_numbers(option: str, text: str | None, kind: Callable[[str], N]) -> tuple[N, ...] | None:
    """'1024,4096' as numbers; None stays None.

    Raises:
        ConfigError: one of them is no such number, or there is none.
    """
    if text is None:
        return None
    try:
        numbers = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError("is not a list of numbers separated by commas", option=option, value=text) from None
    if not numbers:
        raise ConfigError("names no number", option=option, value=text)
    return numbers


def parse_prefill_memory(text: str) -> int | str | None:
    """'auto', None for 'whole', or the bytes of '500MB'.

    Raises:
        ConfigError: none of these.
    """
    if text in ("auto", "whole"):
        return text if text == "auto" else None
    return parse_nbytes("prefill_memory", text, "must be 'auto', 'whole' or a size such as 500MB or 2GB")


def parse_candidates(text: str) -> int | None:
    """A number of at least 1; None for 'all'.

    Raises:
        ConfigError: neither of these.
    """
    if text == "all":
        return None
    if not text.isdecimal() or not int(text):
        raise ConfigError("must be a whole number of at least 1, or 'all'", option="candidates", value=text)
    return int(text)


def parse_nbytes(option: str, text: str, problem: str = "must be a size such as 500MB or 2GB") -> int:
    """'500MB' as bytes.

    Raises:
        ConfigError: it is no size; with `problem`.
    """
    nbytes = find_nbytes(text)
    if not nbytes:
        raise ConfigError(problem, option=option, value=text)
    return nbytes


def split_names(text: str) -> tuple[str, ...]:
    """'a, b' as names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
