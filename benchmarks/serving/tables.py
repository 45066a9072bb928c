"""The results in tables, ready for a document."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Rows = Sequence[dict[str, Any]]
Cells = dict[tuple[int, int | None], list[dict[str, Any]]]


def by_load(rows: Rows) -> dict[tuple[int, int, int], Cells]:
    """The loads by (prompt tokens, requests, new tokens), then by (pool, budget): the rounds of each."""
    loads: dict[tuple[int, int, int], Cells] = {}
    for row in rows:
        if row["kind"] == "load":
            cells = loads.setdefault((row["length"], row["num_requests"], row["new_tokens"]), {})
            cells.setdefault((row["pool"], row["budget"]), []).append(row)
    return dict(sorted(loads.items()))


def tables(rows: Rows) -> list[Table]:
    """One for each kind of row that there is."""
    found = (_loads(rows), _singles(rows), _quality(rows))
    return [table for table in found if table.row_count]


def _loads(rows: Rows) -> Table:
    table = _table("prompt", "requests", "pool", "", "rounds", "running, most", "mean", "requests/s", "tokens/s")
    for name in ("of plain", "first token s", "preempted"):
        table.add_column(name, justify="right")
    for (length, num_requests, _), cells in by_load(rows).items():
        for (pool, budget), own in sorted(cells.items(), key=lambda cell: (cell[0][0], cell[0][1] or 0)):
            plain = {_when(row): row["tokens_per_s"] for row in cells.get((pool, None), ())}
            ratios = [row["tokens_per_s"] / plain[_when(row)] for row in own if _when(row) in plain]
            middle = _medians(own)
            table.add_row(
                *(f"{length:,}", str(num_requests), str(pool), _named(budget), str(len(own))),
                *(f"{middle('max_running'):g}", f"{middle('mean_running'):.1f}", f"{middle('requests_per_s'):.2f}"),
                *(f"{middle('tokens_per_s'):.0f}", _ratios(ratios) if budget else "", f"{middle('first_token_s'):.1f}"),
                f"{middle('num_preemptions'):g}",
            )
    return table


def _when(row: Mapping[str, Any]) -> tuple[str, int]:
    """What is compared was measured in the same round of the same run: between runs a machine changes."""
    return row["run"], row["round"]


def _singles(rows: Rows) -> Table:
    table = _table("prompt", "", "rounds", "prefill s", "of it eviction", "decode ms per token", "of plain's after few")
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "single":
            groups[row["length"], row["budget"]].append(row)
    for (length, budget), own in groups.items():
        named = {"plain": (length, "plain vLLM"), "cut": (length, _named(budget)), "short": (budget, "plain vLLM")}
        for name, (tokens, shown) in named.items():
            middle = _medians([row[name] for row in own])
            evicting = statistics.median(row[name]["eviction_s"] / row[name]["prefill_s"] for row in own)
            table.add_row(
                *(f"{tokens:,}", shown, str(len(own)), f"{middle('prefill_s'):.2f}"),
                f"{middle('eviction_s'):.2f} ({evicting:.1%})" if name == "cut" else "",
                f"{middle('decode_ms'):.1f}",
                _ratios([row[name]["decode_ms"] / row["short"]["decode_ms"] for row in own]),
            )
    return table


def _quality(rows: Rows) -> Table:
    own = [row for row in rows if row["kind"] == "quality"]
    budgets = sorted({row["budget"] for row in own}, key=lambda one: one or 0)
    table = _table("prompt", *(f"{_named(budget)}, answered" for budget in budgets))
    for length in sorted({row["length"] for row in own}):
        scores = [[row["answered"] for row in own if (row["length"], row["budget"]) == (length, b)] for b in budgets]
        shown = (f"{sum(each):g} of {len(each)}" if each else "" for each in scores)
        table.add_row(f"{length:,}", *shown)
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.MARKDOWN)
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table


def _named(budget: int | None) -> str:
    return "plain vLLM" if budget is None else f"budget {budget}"


def _medians(rows: Sequence[Mapping[str, float]]) -> Callable[[str], float]:
    return lambda name: statistics.median(row[name] for row in rows)


def _ratios(ratios: Sequence[float]) -> str:
    """The median, and the least and the most where there are several."""
    if not ratios:
        return ""
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"
