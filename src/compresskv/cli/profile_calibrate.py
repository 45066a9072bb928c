"""`compresskv profile calibrate`: a profile with the model's own curves of loss over coverage."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskv.cli.options import JsonOption
from compresskv.cli.outputs import check_outputs, check_writable
from compresskv.cli.terminal import counted, out
from compresskv.errors import ConfigError, DataError

if TYPE_CHECKING:
    from compresskv.evaluation.records import Record

CALIBRATE_EPILOG = """\b
Example:
  compresskv eval --tasks needle,ruler --methods blend --no-answers \\
      --budgets 'auto[at_most=128],auto[at_most=25%],auto[at_most=50%]' \\
      --model ./my-model -o runs/loss
  compresskv profile calibrate my-profile.json runs/loss -o my-profile.json
"""
_LEAST_PROMPTS = 20


def calibrate(
    profile: Annotated[Path, typer.Argument(help="A profile file.")],
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of 'compresskv eval' with automatic budgets.", metavar="RUN")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The profile to write; may be the same file.", metavar="FILE")
    ],
    level: Annotated[
        float, typer.Option(help="The share of measured losses that shall lie below a curve.", metavar="SHARE")
    ] = 0.97,
    as_json: JsonOption = False,
) -> None:
    """Fit what --budget auto predicts to measured losses.

    The runs must be of the profile's model, and hold 20 prompts or more of a method. What is fitted takes the place of
    the general curve, which is laid so high that it holds on other models, too.
    """
    if not 0 < level <= 1:
        raise ConfigError("must lie above 0 and at most at 1", option="level", value=level)
    records_of = {str(run): [run / name for name in ("run.json", "records.jsonl")] for run in runs}
    check_outputs({"output": output}, {f"run {name}": files for name, files in records_of.items()})
    place = check_writable("output", output, kind="JSON")
    from compresskv.evaluation.loss_curves import fit, points_of, share_below
    from compresskv.evaluation.run_folder import read_run
    from compresskv.profiles.profile import read_profile
    from compresskv.profiles.store import write_profile

    own, records = read_profile(profile), []
    for run in runs:
        facts, found = read_run(run)
        if own.fingerprint.weights is not None and facts.get("weights") != str(own.fingerprint):
            problem = f"holds records of {facts.get('weights')}, and the profile is of {own.fingerprint}"
            raise DataError(problem, option="runs", value=str(run))
        records += found
    curves = dict(own.loss_curves)
    told: list[dict[str, Any]] = []
    for method in sorted({record.method for record in records if record.uncovered is not None}):
        if "[" in method:  # options of one's own: the profile's curve is of the method as it is
            continue
        points = points_of(record for record in records if record.method == method)
        _check_prompts(method, records)
        curve = fit(points, level)
        curves[method] = (curve.scale, curve.power)
        told.append({"method": method, **asdict(curve), "points": len(points), "below": share_below(points, curve)})
    if not told:
        problem = "hold no record with an automatic budget: give budgets='auto[at_most=25%]' to 'compresskv eval'"
        raise DataError(problem, option="runs", value=" ".join(map(str, runs)))
    made = {**own.provenance, "loss_curves": {"level": level, "runs": [run.name for run in runs], "curves": told}}
    write_profile(replace(own, loss_curves=curves, provenance=made), place)
    if as_json:
        out.print_json(json.dumps({"file": str(place), "curves": told}))
        return
    out.print(str(place))
    for one in told:
        number = counted(one["points"], "point")
        out.print(f"{one['method']}: loss = {one['scale']:.3g} * uncovered ** {one['power']:g} ({number})")


def _check_prompts(method: str, records: "list[Record]") -> None:
    prompts = {record.prompt_sha256 for record in records if record.method == method and record.uncovered}
    if len(prompts) < _LEAST_PROMPTS:
        problem = f"hold {counted(len(prompts), 'prompt')} of {method!r} that lost tokens: {_LEAST_PROMPTS} are needed"
        raise DataError(problem, option="runs")
