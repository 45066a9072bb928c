"""`scripts/calibrate-auto`: what automatic budgets predict against what was lost, from the records of evaluations."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from compresskv.errors import CompressKVError
from compresskv.evaluation.loss_curves import Point, fit, left_out, points_of, share_below
from compresskv.evaluation.records import Record
from compresskv.evaluation.run_folder import read_run
from compresskv.selection.auto_budget import find_auto_budget
from compresskv.system.drawing import COLOURS, MARKERS, new_figure, save_figure


def main() -> None:
    """Print the tables, and draw the points."""
    options = _options()
    records = [record for folder in options.runs for record in read_run(folder)[1]]
    points = points_of(records)
    if not points:
        sys.exit("scripts/calibrate-auto: no record has an automatic budget: run 'compresskv eval --budgets auto ...'")
    for method in sorted({point.method for point in points}):
        _print_curves(method, [point for point in points if point.method == method], options.level)
    _print_outcomes(records)
    if options.plot is not None:
        draw(records, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/calibrate-auto", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of 'compresskv eval'")
    parser.add_argument("--level", type=float, default=0.97, help="share of the points that shall lie below a curve")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw predicted against measured losses")
    return parser.parse_args()


def _print_curves(method: str, points: list[Point], level: float) -> None:
    curve = fit(points, level)
    print(f"\n{method}: {len(points)} points; loss = {curve.scale:.4g} * uncovered ** {curve.power:g}\n")
    print("| left out | points | below the others' curve |\n|---|---:|---:|")
    for of in ("model", "task"):
        for value, (_, below, count) in left_out(points, of, level).items():
            print(f"| {value} | {count} | {below:.0%} |")
    print(f"| nothing | {len(points)} | {share_below(points, curve):.0%} |")


def _print_outcomes(records: list[Record]) -> None:
    """Of each automatic budget without a ceiling: how often less was lost than it allows, and what it kept."""
    groups: dict[tuple[str, str, float], list[Record]] = defaultdict(list)
    for record in records:
        auto = find_auto_budget(record.budget) if isinstance(record.budget, str) else None
        if auto is not None and auto.at_most is None and record.kl_divergence is not None:
            groups[record.method, record.versions["model"], auto.max_loss].append(record)
    print("\n| method | model | allowed | prompts | within | mean KL | largest KL | kept |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for (method, model, allowed), own in sorted(groups.items()):
        losses = [record.kl_divergence or 0.0 for record in own]
        within = sum(loss <= allowed for loss in losses)
        kept = sum(record.retained_fraction for record in own) / len(own)
        print(
            f"| {method} | {model} | {allowed:g} | {len(own)} | {within} ({within / len(own):.0%}) | "
            f"{sum(losses) / len(own):.3f} | {max(losses):.3f} | {kept:.0%} |"
        )


def draw(records: list[Record], path: Path) -> None:
    """Measured over predicted loss, a point a record, a colour a model.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    found = [one for one in records if one.predicted_loss and one.kl_divergence is not None]
    names = sorted({one.method for one in found})
    models = sorted({one.versions["model"] for one in found})
    figure = new_figure(4.6 * len(names), 4.2)
    for place, (name, axes) in enumerate(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)):
        for number, model in enumerate(models):
            own = [one for one in found if (one.method, one.versions["model"]) == (name, model)]
            pairs = [(one.predicted_loss or 0.0, max(one.kl_divergence or 0.0, 1e-4)) for one in own]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(*zip(*pairs, strict=True), marker, color=COLOURS[number], markersize=4, alpha=0.7, label=model)
        axes.set(xscale="log", yscale="log", xlabel="predicted loss", title=name)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="black", linewidth=1, label="as predicted")
        if place == 0:
            axes.set_ylabel("measured KL, nats per token")
            axes.legend(fontsize=6, loc="upper left")
    save_figure(figure, path)


if __name__ == "__main__":
    try:
        main()
    except CompressKVError as error:
        sys.exit(f"scripts/calibrate-auto: {error}")
