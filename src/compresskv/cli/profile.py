"""`compresskv profile`: make a model's profile, look at it, check it, import a published one."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv import defaults
from compresskv.cli.command import Command
from compresskv.cli.group import CommandGroup
from compresskv.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OutputOption,
    parse_numbers,
)
from compresskv.cli.outputs import check_folder, check_outputs, check_writable
from compresskv.cli.profile_calibrate import CALIBRATE_EPILOG, calibrate
from compresskv.cli.profile_import import IMPORT_EPILOG, import_profile
from compresskv.cli.profile_tables import answers, layer_table, print_heads, print_stores
from compresskv.cli.terminal import Bar, counted, err, new_table, out
from compresskv.errors import ProfileError
from compresskv.selection.budgets import check_budget
from compresskv.selection.sharing import error_aware
from compresskv.system.paths import is_file, why_unseen

if TYPE_CHECKING:
    from compresskv.profiles.profile import Profile

DEFAULT_COMMAND = "find"
_FIGURES = ("head_scores.png", "layer_budgets.png")


class _DefaultToFind(CommandGroup):
    """`profile MODEL` means `profile find MODEL`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = [DEFAULT_COMMAND, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # 'profile --quick MODEL': an option before the model is the default command's
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


_FIND_EPILOG = """\b
Examples:
  compresskv profile ./my-model --quick
  compresskv profile org/name --haystack notes/ --lengths 2048,8192,16384
"""

profile_app = typer.Typer(
    cls=_DefaultToFind,
    help="Make, show, verify, import or calibrate a model's profile: its retrieval heads and layer errors. "
    "'compresskv profile MODEL' is short for 'compresskv profile find MODEL'.",
    epilog=_FIND_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
)

FileArgument = Annotated[str, typer.Argument(help="A profile file, or a model's name to show its own profile.")]
HaystackOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--haystack", help="Text file or folder of .txt; repeatable. Default: Python's help topics.", metavar="PATH"
    ),
]
NeedlesOption = Annotated[
    Path | None, typer.Option(help="JSON file of needles. Default: those of this package.", metavar="FILE")
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Write figures into this folder.", metavar="FOLDER")]

_SHOW_EPILOG = f"""\b
Examples:
  compresskv profile show {defaults.MODEL}
  compresskv profile show my-profile.json --budget 128 --plot figures
"""
_VERIFY_EPILOG = f"""\b
Examples:
  compresskv profile verify {defaults.MODEL}
  compresskv profile verify ./my-model my-profile.json --counts 5,10 \\
      --plot figures
"""


@profile_app.command(DEFAULT_COMMAND, cls=Command, epilog=_FIND_EPILOG)
def find(
    model: ModelArgument,
    haystack: HaystackOption = None,
    needles: NeedlesOption = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens. Default: those of 1024,2048,4096 that fit the model.", metavar="LENGTHS"
        ),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Needle depths in percent. Default: 10,30,50,70,90.", metavar="DEPTHS")
    ] = None,
    output: OutputOption = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A first, rougher result in minutes: 1,024 tokens, depths 10,50,90, six documents."
        ),
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's retrieval heads and layer errors. A killed run goes on where it stopped.

    A quick profile is used where the model has no full one, and never replaces one.
    """
    from compresskv.calibration.settings import CalibrationSettings

    check_outputs({"output": output}, {"model": model, "haystack": haystack, "needles": needles})
    given: dict[str, Any] = {
        "lengths": parse_numbers("lengths", lengths, int),
        "depths": parse_numbers("depths", depths, float),
        **_texts(haystack, needles),
    }
    changes = {name: value for name, value in given.items() if value is not None}
    settings = CalibrationSettings.quick(**changes) if quick else CalibrationSettings(**changes)
    place = None if output is None else check_writable("output", output, kind="JSON")
    from compresskv.calibration.find import find_profile
    from compresskv.calibration.measure import NothingRetrievedError
    from compresskv.calibration.runs import check_log_folder
    from compresskv.models.fingerprint import fingerprint
    from compresskv.models.load import load
    from compresskv.profiles import store
    from compresskv.prompts.prompt import context_length

    check_log_folder(log_folder := store.user_folder() / "runs")
    with Bar() as bar:
        loaded, tokenizer = load(model, dtype=dtype, device=device, on_progress=bar)
        path = place or store.default_path(fingerprint(loaded), quick=quick)
        store.check_profile_place(path)
        if lengths is None:
            settings = settings.fitted(context_length(loaded))
        try:
            outcome = find_profile(loaded, tokenizer, model, log_folder, settings, bar)
        except NothingRetrievedError as error:
            bar.stop()
            err.print(answers(error.runs), soft_wrap=False)
            raise
    store.write_profile(outcome.profile, path)
    if as_json:
        out.print_json(json.dumps({"file": str(path), **outcome.profile.to_dict()}))
        return
    made = outcome.profile.provenance
    runs = f"{counted(outcome.profile.num_runs, 'run')} counted, {made['runs_failed']} failed to answer and left out"
    out.print(f"{path}\n{runs}; computed in {made['dtype']}.")
    print_heads(outcome.profile)
    print_stores(outcome.profile)


@profile_app.command(cls=Command, epilog=_SHOW_EPILOG)
def show(
    profile: FileArgument,
    budget: Annotated[
        int, typer.Option(help="Mean tokens per layer for the layer budgets.", metavar="TOKENS")
    ] = defaults.BUDGET,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a profile's heads and layer budgets.

    With --plot they are drawn, too.
    """
    check_budget(budget)
    figures = {"plot": None if plot is None else [plot / name for name in _FIGURES]}
    check_outputs(figures, {"profile": profile})
    check_folder("plot", plot, _FIGURES)
    loaded = _find_file(profile)
    tokens = error_aware(budget, sys.maxsize, loaded.layer_errors)  # of a prompt too long to cap any layer
    if as_json:
        budgets = dict(zip(map(str, loaded.layer_indices), tokens, strict=True))
        out.print_json(json.dumps({**loaded.to_dict(), "layer_budgets": budgets}))
    else:
        print_heads(loaded)
        print_stores(loaded)
        out.print(f"\nlayer budgets of method compresskv at a mean of {counted(budget, 'token')}")
        out.print(layer_table(loaded, tokens), soft_wrap=False)
    if plot is not None:
        from compresskv.calibration import plots

        plots.head_scores(loaded, plot / "head_scores.png")
        plots.layer_budgets(loaded, budget, plot / "layer_budgets.png")
        err.print(f"figures: {plot / 'head_scores.png'}, {plot / 'layer_budgets.png'}")


profile_app.command("import", cls=Command, epilog=IMPORT_EPILOG)(import_profile)
profile_app.command("calibrate", cls=Command, epilog=CALIBRATE_EPILOG)(calibrate)


@profile_app.command(cls=Command, epilog=_VERIFY_EPILOG)
def verify(
    model: ModelArgument,
    profile: Annotated[Path | None, typer.Argument(help="Default: the model's own profile.")] = None,
    counts: Annotated[str, typer.Option(help="How many heads to mask.", metavar="COUNTS")] = "5,10,20,30",
    length: Annotated[int, typer.Option(help="Prompt length in tokens.", metavar="TOKENS")] = 1024,
    documents: Annotated[int, typer.Option(help="Documents to ask about, four needles each.", metavar="N")] = 6,
    haystack: HaystackOption = None,
    needles: NeedlesOption = None,
    seed: Annotated[int, typer.Option(help="Of the random heads.", metavar="SEED")] = 0,
    plot: PlotOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Test whether needles are still found with heads masked.

    The profile's best heads are masked, and as many at random: a good profile's cost the model its answers.
    """
    inputs = {"model": model, "profile": profile, "haystack": haystack, "needles": needles}
    check_outputs({"plot": None if plot is None else plot / "verify.png"}, inputs)
    check_folder("plot", plot, ["verify.png"])
    from compresskv.calibration.verify import VerifySettings, to_rows, verify_profile
    from compresskv.models.load import load
    from compresskv.models.quantize import weights_dtype
    from compresskv.profiles.profile import read_profile
    from compresskv.profiles.store import resolve_profile

    settings = VerifySettings(
        counts=parse_numbers("counts", counts, int) or (),
        length=length,
        num_documents=documents,
        seed=seed,
        **_texts(haystack, needles),
    )
    if profile is not None:
        read_profile(profile)
    with Bar() as bar:
        loaded, tokenizer = load(model, dtype=dtype, device=device, on_progress=bar)
        ablations = verify_profile(loaded, tokenizer, resolve_profile(loaded, profile), settings, bar)
    if as_json:
        out.print_json(json.dumps([{**row, "dtype": weights_dtype(loaded)} for row in to_rows(ablations)]))
    else:
        columns = ("heads", "answered", "accuracy")
        table = new_table("masked", *columns, numbers=columns)
        for one in ablations:
            table.add_row(one.group, str(one.count), f"{one.successes} of {one.cases}", f"{one.accuracy:.0%}")
        table.caption, table.caption_justify = f"computed in {weights_dtype(loaded)}", "left"
        out.print(table, soft_wrap=False)
    if plot is not None:
        from compresskv.calibration import plots

        plots.ablation(ablations, plot / "verify.png")
        err.print(f"figure: {plot / 'verify.png'}")


def _texts(haystack: list[Path] | None, needles: Path | None) -> dict[str, Any]:
    """What is given to hide and to hide it in, as settings; it is read before a model is loaded."""
    from compresskv.calibration.haystack import read_haystack
    from compresskv.calibration.needles import read_needles

    if haystack:
        read_haystack(haystack)
    if needles is not None:
        read_needles(needles)
    return {"haystack": tuple(map(str, haystack or [])), "needles": None if needles is None else str(needles)}


def _find_file(name: str) -> "Profile":
    """The profile in file `name`, or the stored profile of a model called `name`."""
    from compresskv.profiles.profile import read_profile
    from compresskv.profiles.store import stored_profiles

    if is_file(name) or why_unseen(name):
        return read_profile(name)
    for stored in stored_profiles():
        if stored.model_id == name:
            return stored
    raise ProfileError(f"{name!r} is neither a profile file nor a model with a stored profile")
