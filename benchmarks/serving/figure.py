"""The figure of the loads: what a server does against the pool's size, a row of panels for each prompt length."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.tables import by_load
from compresskv.errors import ConfigError
from compresskv.system.drawing import new_figure, save_figure

# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "os^DvP"
_PLAIN: dict[str, Any] = {"color": "black", "marker": "x", "linestyle": "--"}
_PANELS = {
    "requests_per_s": "requests per second",
    "first_token_s": "seconds to the first token, mean",
    "mean_running": "requests running, mean",
    "tokens_per_s": "tokens per second",
}


def draw_loads(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Medians over rounds; a line for each budget, plain vLLM dashed.

    Raises:
        ConfigError: there are no loads, matplotlib is missing, or the file cannot be written.
    """
    loads = by_load(rows)
    if not loads:
        raise ConfigError(f"--plot {path}: the file holds no loads")
    budgets = sorted({budget for cells in loads.values() for _, budget in cells if budget is not None})
    figure = new_figure(14.0, 0.8 + 2.7 * len(loads))
    panels = figure.subplots(len(loads), len(_PANELS), squeeze=False)
    for (length, num_requests, new_tokens), own, cells in zip(loads, panels, loads.values(), strict=True):
        for axes, name in zip(own, _PANELS, strict=True):
            _draw(axes, cells, name, budgets)
        own[0].set_ylabel(f"{num_requests} prompts of {length:,} tokens,\n{new_tokens} new ones each")
    for axes, title in zip(panels[0], _PANELS.values(), strict=True):
        axes.set_title(title, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("KV cache pool, in whole requests")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(budgets) + 1, frameon=False)
    save_figure(figure, path)


def _draw(axes: Any, cells: dict[tuple[int, int | None], list[dict[str, Any]]], name: str, budgets: list[int]) -> None:
    pools = sorted({pool for pool, _ in cells})
    for budget in (None, *budgets):
        points = [
            (pool, statistics.median(row[name] for row in cells[pool, budget]))
            for pool in pools
            if (pool, budget) in cells
        ]
        number = -1 if budget is None else budgets.index(budget)
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        label = "plain vLLM" if budget is None else f"budget {budget}"
        # a line without points keeps its place in the legend
        axes.plot(*(zip(*points, strict=True) if points else ([], [])), label=label, **(style if budget else _PLAIN))
    axes.margins(y=0.1)
    axes.set_xticks(pools)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
