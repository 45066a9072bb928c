"""Seconds and peak memory from a prompt to the last of its generated tokens, against the prompt's length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresskv.system.drawing import COLOURS, MARKERS, new_figure, save_figure

_PLAIN: dict[str, Any] = {"color": "black", "marker": "x", "linestyle": "--"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Two panels, a line for each method; nothing where no row is there.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    parts = result["parts"].values()
    rows = [row for part in parts if part.get("task", {}).get("kind") == "end_to_end" for row in part.get("rows", [])]
    if not rows:
        return
    figure = new_figure(9.0, 3.8)
    seconds, peaks = figure.subplots(1, 2)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    others = [method for method in methods if method != "plain"]
    for method in methods:
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: int(row["length"]))
        lengths, at = [row["length"] for row in own], others.index(method) if method in others else 0
        style = _PLAIN if method == "plain" else {"color": COLOURS[at], "marker": MARKERS[at]}
        seconds.plot(lengths, [row["total_s"] for row in own], label=method, **style)
        known = [
            (row["length"], row["peak_growth_nbytes"] / 1e9) for row in own if row["peak_growth_nbytes"] is not None
        ]
        if known:
            peaks.plot(*zip(*known, strict=True), label=method, **style)
    new_tokens = rows[0]["new_tokens"]
    for axes, title in ((seconds, f"prompt and {new_tokens:,} tokens, s"), (peaks, "memory beside the weights, GB")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("prompt length, tokens")
        axes.set_xscale("log", base=2)
        ticks = sorted({row["length"] for row in rows})
        axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    seconds.legend(frameon=False, fontsize=9)
    geometry = next(
        part["task"]["geometry"] for part in parts if part.get("rows") and "geometry" in part.get("task", {})
    )
    machine = result["parts"].get("starts", {}).get("machine", {})
    figure.suptitle(f"random {geometry}, {machine.get('processor', result['device'])}", fontsize=10)
    save_figure(figure, path)
