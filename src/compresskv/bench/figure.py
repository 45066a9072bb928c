"""The figure of a run: decode latency and peak memory against prompt length."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compresskv.errors import ConfigError
from compresskv.system.drawing import COLOURS, MARKERS, new_figure, save_figure

_PLAIN: dict[str, Any] = {"color": "black", "marker": "x", "linestyle": "--", "linewidth": 1.6}
_LEAST: dict[str, Any] = {"color": "#8c8c8c", "marker": ".", "linestyle": ":", "linewidth": 1.4}
_LABEL_COLUMNS = 3
_MOST_TICKS = 8


def check_drawable(path: Path) -> None:
    """Refuse before anything is measured.

    Raises:
        ConfigError: matplotlib is missing, or does not know the file's ending.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(": no such format; end the name with .png, .svg or .pdf", option="plot", value=str(path))


def draw_run(result: dict[str, Any], path: Path) -> None:
    """Two panels, a line for each method and budget, plain transformers dashed.

    Args:
        result: what `Bench.result` returned.
    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    asked = set(result["settings"]["lengths"])
    peers = [row for row in result.get("peers", []) if row["engine"] != "transformers"]
    rows = [row for row in result["rows"] + peers if row["length"] in asked]
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row_name(row), []).append(row)
    figure = new_figure(9.0, 3.6 + 0.2 * ((len(series) + 1) // _LABEL_COLUMNS))
    latency, memory = figure.subplots(1, 2)
    styles = _styles(list(series))
    for name, own in series.items():
        _line(latency, own, lambda row: row["decode_ms"], name, styles[name])
        _line(memory, own, _peak_mb, name, styles[name])
    if "plain" in series:
        _line(latency, series["plain"], lambda row: row["least_decode_ms"], "least for plain", _LEAST)
    lengths = sorted({row["prompt_tokens"] for row in rows})
    _finish(latency, "decode, ms per token", lengths)
    _finish(memory, "growth of memory in prefill, MB", lengths)
    lines, labels = latency.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=_LABEL_COLUMNS, frameon=False, fontsize=9)
    model = result["model"]
    figure.suptitle(f"{model['name']}, {model['dtype']}, {result['machine']['processor']}", fontsize=10)
    save_figure(figure, path)


def row_name(row: dict[str, Any]) -> str:
    """'plain', 'full', 'snapkv compiled 128', 'snapkv int4 3MB', 'kvpress SnapKV 3%'."""
    name, budget = str(row["method"]), row["budget"]
    if row["decode"] != "eager":
        name += f" {row['decode']}"
    if row["engine"] == "kvpress":
        name = name.replace(":", " ").replace("Press", "")
    if budget is None:
        return name
    return f"{name} {f'{100 * budget:g}%' if isinstance(budget, float) else budget}"


def _peak_mb(row: dict[str, Any]) -> float | None:
    return None if row["peak_nbytes"] is None else row["peak_nbytes"] / 1e6


def _line(
    axes: Any,
    rows: Sequence[dict[str, Any]],
    figure: Callable[[dict[str, Any]], float | None],
    label: str,
    style: dict[str, Any],
) -> None:
    points = sorted((row["prompt_tokens"], value) for row in rows if (value := figure(row)) is not None)
    if points:
        axes.plot(*zip(*points, strict=True), label=label, markersize=5, **style)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    styles = {"plain": _PLAIN}
    for at, name in enumerate(name for name in names if name != "plain"):
        styles[name] = {
            "color": COLOURS[at % len(COLOURS)],
            "marker": MARKERS[at % len(MARKERS)],
            "linestyle": "-" if at < len(COLOURS) else "-.",
            "linewidth": 1.4,
        }
    return styles


def _finish(axes: Any, title: str, lengths: Sequence[int]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylim(bottom=0)
    ticks = list[int]()
    for length in reversed(lengths):
        if not ticks or ticks[-1] - length > lengths[-1] / _MOST_TICKS:  # closer ones would be written over each other
            ticks.append(length)
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.grid(alpha=0.3)
