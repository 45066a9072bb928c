"""The figure of the loads: requests running and tokens per second against the pool's size."""

import statistics
from pathlib import Path
from typing import Any

from compresskv.drawing import new_figure, save_figure

_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_PANELS = (("mean_running", "requests running, mean"), ("tokens_per_s", "tokens per second"))


def draw_loads(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels for the prompt length with most pools: medians of each budget, plain vLLM dashed.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    loads = [row for row in rows if row["kind"] == "load"]
    pools = {
        length: {row["pool"] for row in loads if row["length"] == length} for length in {r["length"] for r in loads}
    }
    length = max(pools, key=lambda one: len(pools[one]))
    series: dict[int | None, list[dict[str, Any]]] = {}
    for row in sorted(loads, key=lambda one: (one["budget"] is not None, one["budget"] or 0, one["pool"])):
        if row["length"] == length:
            series.setdefault(row["budget"], []).append(row)
    figure = new_figure(9.0, 3.8)
    panels = figure.subplots(1, len(_PANELS))
    for axes, (name, title) in zip(panels, _PANELS, strict=True):
        for number, (budget, own) in enumerate(series.items()):
            style = {"color": "black", "linestyle": "--"} if budget is None else {"color": _COLOURS[number - 1]}
            label = "plain vLLM" if budget is None else f"budget {budget}"
            points = {pool: [row[name] for row in own if row["pool"] == pool] for pool in sorted(pools[length])}
            medians = [(pool, statistics.median(values)) for pool, values in points.items() if values]
            axes.plot(*zip(*medians, strict=True), label=label, marker="o", **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"pool, in whole requests of {length:,} tokens")
        axes.set_xticks(sorted(pools[length]))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(series), frameon=False, fontsize=9)
    save_figure(figure, path)
