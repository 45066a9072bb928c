"""Figures of a report: scores and fidelity against what is retained, needle maps."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compresskv.selection.budgets import budget_order
from compresskv.selection.precision import NATIVE, PRECISIONS
from compresskv.system.drawing import COLOURS, MARKERS, new_figure, save_figure

_COLOURS = (*COLOURS, "#000000")
_LINES = ("-", "--", ":")
_FIDELITY = {
    "evidence_recall": "evidence retained, %",
    "top1_agreement": "same token as full, %",
    "kl_divergence": "KL, nats per token",
}
_WIDTH = 9.0  # inches: text of 9 points can be read where the page shows the figure 900 pixels wide


def draw(section: dict[str, Any], folder: Path, name: str) -> dict[str, Path]:
    """Draw what a model's section of `report_data` holds; file names start with `name`.

    Returns: what each figure is, with its path.

    Raises:
        ConfigError: matplotlib is missing, or a file cannot be written.
    """
    drawn: dict[str, Path] = {}
    styles = _styles(section["overall"]["rows"])
    held = "'s bytes" if _in_bytes(section["overall"]) else " retained"
    scored = [table for table in section["groups"] if any(row["score"] for row in _compressed(table))]
    if scored:
        path = folder / f"{name}-score.png"
        _curves([(table, "score", f"{table['name']}: score, %") for table in scored], styles, path)
        drawn[f"Score against the share of the cache{held}"] = path
    overall = section["overall"]
    measured = [key for key in _FIDELITY if any(row[key] is not None for row in _compressed(overall))]
    if measured:
        path = folder / f"{name}-fidelity.png"
        panels = [(overall, key, _FIDELITY[key]) for key in measured]
        if _in_bytes(overall) and any(row["score"] for row in _compressed(overall)):
            panels.insert(0, (overall, "score", "score, %"))  # what bits are worth, in one picture
        _curves(panels, styles, path)
        drawn[f"Fidelity to the full cache against the share of the cache{held}"] = path
    for task in dict.fromkeys(one["task"] for one in section["heat_maps"]):
        path = folder / f"{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', task)}.png"
        _heat_maps([one for one in section["heat_maps"] if one["task"] == task], list(styles), path)
        drawn[f"{task}: score by length and depth"] = path
    return drawn


def _curves(panels: Sequence[tuple[dict[str, Any], str, str]], styles: dict[str, dict[str, Any]], path: Path) -> None:
    """A panel for each (table, key, title): a line a method over the share retained, the full cache dashed."""
    num_columns = 2 if len(panels) == 4 else min(len(panels), 3)
    num_rows = math.ceil(len(panels) / num_columns)
    width = _WIDTH if num_columns > 1 else 6.0
    num_legend = _legend_columns(["full", *styles], width)
    legend_height = 0.2 * math.ceil((len(styles) + 1) / num_legend)
    figure = new_figure(width, 3.1 * num_rows + legend_height)
    known: dict[str, Any] = {}
    for at, (table, key, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, at)
        known.update(_panel(axes, table, key, styles))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("share of the cache's bytes, %" if _in_bytes(table) else "share of the cache retained, %")
    order = [label for label in ("full", *styles) if label in known]
    lines = [known[label] for label in order]
    style = {"ncols": num_legend, "frameon": False, "fontsize": 9, "handlelength": 3}
    figure.legend(lines, order, loc="outside lower center", **style)  # where it hides no line
    save_figure(figure, path)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns a legend of that many inches has room for: each is as wide as its longest label."""
    for num_columns in (4, 3, 2):
        size = math.ceil(len(labels) / num_columns)
        longest = [max(map(len, labels[at : at + size])) for at in range(0, len(labels), size)]
        if sum(0.8 + 0.075 * length for length in longest) < width:
            return num_columns
    return 1


def _panel(axes: Any, table: dict[str, Any], key: str, styles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    lines: dict[str, Any] = {}
    scale = 1 if key == "kl_divergence" else 100
    rows = [row for row in table["rows"] if row[key] is not None and row["num_tasks"] == len(table["tasks"])]
    held = "kv_fraction" if _in_bytes(table) else "retained_fraction"
    _log_axis(axes, [100 * row[held] for row in rows if row["series"] in styles])
    curves = {
        series: sorted((100 * row[held], scale * _mean(row[key])) for row in rows if row["series"] == series)
        for series in styles
    }
    ahead = list(filter(None, curves.values()))
    for series, points in curves.items():
        if points:
            ahead.pop(0)
            style = {**styles[series], "markersize": 5.0}
            if equal := ahead.count(points):  # of equal curves each is wider than those drawn over it
                style |= {"linewidth": style["linewidth"] + 3 * equal, "markersize": 5.0 + 4 * equal, "zorder": 2}
            (lines[series],) = axes.plot(*zip(*points, strict=True), label=series, **style)
    full = [row for row in rows if row["method"] == "full"]
    if full and lines:
        height = scale * _mean(full[0][key])
        lines["full"] = axes.axhline(height, color="#555555", linewidth=1.2, linestyle=(0, (6, 3)), label="full")
    axes.grid(alpha=0.3)
    axes.margins(y=0.08)
    return lines


def _log_axis(axes: Any, shares: Sequence[float]) -> None:
    """Ticks where the budgets are: powers of ten alone would leave most of these axes without a number."""
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 1.15, max(shares) * 1.15)  # has a width even where all shares are one
    ticks: list[float] = []
    for share in sorted(shares):
        if not ticks or share > 1.35 * ticks[-1]:  # closer ones would be written over each other
            ticks.append(share)
    axes.set_xticks(ticks, [f"{tick:.2g}" if tick < 99.5 else "100" for tick in ticks])
    axes.minorticks_off()


def _heat_maps(maps: Sequence[dict[str, Any]], series: Sequence[str], path: Path) -> None:
    """A grid of maps, depth over length: a row for each budget, a column for each method, the full cache first."""
    columns = [one for one in ("full", *series) if any(found["series"] == one for found in maps)]
    maps = [one for one in maps if one["series"] in columns]  # without full caches in packed stores
    budgets = list(dict.fromkeys(one["budget"] for one in maps if one["budget"] is not None)) or [None]
    budgets.sort(key=budget_order)
    depths, lengths = (sorted({place for one in maps for place in one[axis]}) for axis in ("depths", "lengths"))
    figure = new_figure(max(4.0, 1.1 * len(columns) + 1.6), 1.5 * len(budgets) + 1.1)
    grid = figure.subplots(len(budgets), len(columns), squeeze=False, sharex=True, sharey=True)
    images = []
    for at, budget in enumerate(budgets):
        drawn: list[Any] = []
        for axes, name in zip(grid[at], columns, strict=True):
            wanted = budget if name != "full" else None
            found = [one for one in maps if one["series"] == name and str(one["budget"]) == str(wanted)]
            if not found or (name == "full" and at):  # the full cache has one map, beside the first budget
                axes.set_axis_off()
                continue
            images.append(_heat_map(axes, found[0], depths, lengths))
            axes.tick_params(labelleft=not drawn, labelbottom=name == "full" or at == len(budgets) - 1, labelsize=7)
            drawn.append(axes)
        _label_row(grid[at], budget)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(_wrapped(name), fontsize=8)
    figure.suptitle(maps[0]["task"], fontsize=10)
    figure.supxlabel("prompt length, tokens", fontsize=9)
    figure.supylabel("depth, %", fontsize=9)
    figure.colorbar(images[0], ax=grid, label="score, %", shrink=0.8, pad=0.01)
    save_figure(figure, path)


def _heat_map(axes: Any, found: dict[str, Any], depths: list[float], lengths: list[float]) -> Any:
    """One map, with a place for each of the depths and lengths of all that share the axes."""
    own = {
        (depth, length): score
        for depth, row in zip(found["depths"], found["scores"], strict=True)
        for length, score in zip(found["lengths"], row, strict=True)
        if score is not None
    }
    scores = [[100 * own.get((depth, length), math.nan) for length in lengths] for depth in depths]
    axes.set_facecolor("#cccccc")  # no case there: not a score of 0
    image = axes.imshow(scores, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    return image


def _label_row(row: Sequence[Any], budget: float | str | None) -> None:
    if budget is not None:
        text = f"{budget} tokens" if isinstance(budget, int) else budget
        text = text if isinstance(text, str) else f"{100 * text:g} %"
        row[-1].annotate(text, (1.04, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize=9)


def _styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each method's line looks, in all figures alike: first those that the report is about.

    Where stores differ, a colour is a store and a kind of line a method.
    """
    compressed = [row for row in rows if row["method"] != "full"]
    own = {row["series"]: row["own"] for row in compressed}
    stores = [name for name in PRECISIONS if any(row["store"] == name for row in compressed)]
    ordered = sorted(own, key=lambda one: (not own[one], one))
    places = {series: divmod(at, len(_COLOURS)) for at, series in enumerate(ordered)}
    if len(stores) > 1:
        methods = sorted(
            {row["method"]: not row["own"] for row in compressed}.items(), key=lambda one: (one[1], one[0])
        )
        laps = {method: lap for lap, (method, _) in enumerate(methods)}
        places = {row["series"]: (laps[row["method"]], stores.index(row["store"])) for row in compressed}
        ordered = sorted(own, key=places.__getitem__)
    return {
        series: {
            "color": _COLOURS[places[series][1]],
            "marker": MARKERS[at % len(MARKERS)],
            "linestyle": _LINES[places[series][0] % len(_LINES)],
            "linewidth": 2.4 if own[series] else 1.3,
            "zorder": 3 if own[series] else 2,
        }
        for at, series in enumerate(ordered)
    }


def _in_bytes(table: dict[str, Any]) -> bool:
    """Whether rows hold numbers in different numbers of bits, so that tokens do not tell what they hold."""
    return any(row["store"] != NATIVE for row in table["rows"])


def _compressed(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in table["rows"] if row["method"] != "full" and row["num_tasks"] == len(table["tasks"])]


def _mean(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)


def _short(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 and length % 512 == 0 else f"{length:g}"


def _wrapped(name: str) -> str:
    """In lines of a heat map's width, broken where words end."""
    lines = [""]
    for part in re.split(r"(?<=[_: ])|(?=\[)|(?<=[a-z])(?=[A-Z])", name):
        if lines[-1] and len(lines[-1] + part) > 14:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)
