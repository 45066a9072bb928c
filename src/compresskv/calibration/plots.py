"""Figures. They need matplotlib (`pip install compresskv[plot]`)."""

import sys
from collections.abc import Sequence
from pathlib import Path

from compresskv.calibration.verify import Ablation
from compresskv.profiles.profile import Profile, Rows
from compresskv.selection.sharing import error_aware
from compresskv.system.drawing import new_figure as _figure
from compresskv.system.drawing import save_figure as _save

_COLOURS = {"semantic": "#c1272d", "traditional": "#0072b2", "random": "#8c8c8c"}
_STYLES = {"semantic": "o-", "traditional": "s--", "random": "^:"}  # lines that coincide must both be seen


def head_scores(profile: Profile, path: Path) -> None:
    """Heat map of head scores, layer x head, semantic beside traditional.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    ranks_only = profile.num_runs == 0  # imported: comparable within a layer, not across layers
    semantic = "Rank within the layer, best = 1" if ranks_only else "Semantic retrieval score"
    tables: list[tuple[str, Rows]] = [(semantic, profile.semantic_scores)]
    if profile.traditional_scores is not None:
        tables.append(("Traditional retrieval score", profile.traditional_scores))
    num_layers, num_heads = len(profile.layer_indices), profile.fingerprint.num_query_heads
    width = max(3.0, 0.16 * num_heads + 1.8)
    figure = _figure(width * len(tables), max(3.0, 0.16 * num_layers + 1.5))
    figure.suptitle(_name(profile), fontsize=11)
    for i, (title, rows) in enumerate(tables):
        axes = figure.add_subplot(1, len(tables), i + 1)
        image = axes.imshow(rows, aspect="auto", cmap="magma_r", interpolation="nearest", vmin=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        step = max(1, num_layers // 15)
        axes.set_yticks(range(0, num_layers, step), [str(index) for index in profile.layer_indices[::step]])
        axes.set_xticks(range(0, num_heads, max(1, num_heads // 12)))
        # Faint lines between the cells, so that a cell's layer and head can be read off.
        axes.set_yticks([row - 0.5 for row in range(1, num_layers)], minor=True)
        axes.set_xticks([head - 0.5 for head in range(1, num_heads)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
        figure.colorbar(image, ax=axes)
    _save(figure, path)


def layer_budgets(profile: Profile, budget: int, path: Path) -> None:
    """Bars: tokens that each layer retains at a mean budget.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    tokens = error_aware(budget, sys.maxsize, profile.layer_errors)
    figure = _figure(max(5.0, 0.2 * len(tokens) + 1.5), 3.4)
    axes = figure.add_subplot()
    axes.bar([str(index) for index in profile.layer_indices], tokens, color=_COLOURS["traditional"])
    axes.axhline(budget, color="black", linewidth=1, linestyle="--", label=f"uniform: {budget}")
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens retained per KV head")
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.01)
    axes.set_title(_name(profile), fontsize=11, loc="left")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)  # above, clear of the bars
    _save(figure, path)


def ablation(ablations: Sequence[Ablation], path: Path) -> None:
    """Lines: needle accuracy against heads masked, for each kind of head.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(5.5, 3.5)
    axes = figure.add_subplot()
    base = next(one for one in ablations if one.group == "none")
    for group, colour in _COLOURS.items():
        points = [one for one in ablations if one.group == group]
        if points:
            counts = [0, *(one.count for one in points)]
            accuracies = [base.accuracy, *(one.accuracy for one in points)]
            axes.plot(counts, [100 * one for one in accuracies], _STYLES[group], color=colour, label=f"{group} heads")
    axes.set_xlabel("heads masked")
    axes.set_ylabel("needles answered, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def _name(profile: Profile) -> str:
    return profile.model_id.rstrip("/").rpartition("/")[2]  # of a folder, whose whole path would not fit
